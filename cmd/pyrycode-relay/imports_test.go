package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const (
	modulePath    = "github.com/pyrycode/pyrycode-relay"
	repository    = "../.." // seen from this package's tests
	serverLibrary = "github.com/coder/websocket"
	clientLibrary = "nhooyr.io/websocket"
)

// rooms says what each room may import besides the standard library and itself.
// cmd may import every room. A new third-party import is a line here, and a
// matter for review.
var rooms = map[string]struct {
	rooms   []string
	modules []string
}{
	"bus": {
		modules: []string{"github.com/nats-io/nats.go", "github.com/nats-io/nats-server/v2"}, // the latter for the embedded server
	},
	"registry": {
		rooms:   []string{"bus"},
		modules: []string{"github.com/nats-io/nats.go"},
	},
	"gateway": {
		rooms: []string{"bus", "registry"},
		modules: []string{
			serverLibrary, "github.com/go-json-experiment/json", "github.com/prometheus/client_golang", "golang.org/x/time",
		},
	},
	"testenv": {
		modules: []string{clientLibrary, "github.com/nats-io/nats-server/v2", "github.com/nats-io/nats.go", "go.uber.org/goleak"},
	},
	"cmd": {
		rooms: []string{"bus", "registry", "gateway", "testenv"},
		modules: []string{
			"github.com/HdrHistogram/hdrhistogram-go", "github.com/nats-io/nats.go", "github.com/nats-io/nats-server/v2", "github.com/pires/go-proxyproto",
			"github.com/prometheus/client_golang", "golang.org/x/crypto", "golang.org/x/sys",
		},
	},
}

// testModules are what tests of any room may import as well.
var testModules = []string{
	"github.com/anishathalye/porcupine", "github.com/nats-io/nats-server/v2", "github.com/nats-io/nats.go",
	"github.com/prometheus/client_golang", "go.uber.org/goleak", "go.yaml.in/yaml/v3", "pgregory.net/rapid",
}

func TestRoomsImportOnlyWhatTheyMay(t *testing.T) {
	for room, may := range rooms {
		for file, imports := range importsOf(t, room) {
			allowedRooms, allowedModules := append(may.rooms[:len(may.rooms):len(may.rooms)], room), may.modules
			if strings.HasSuffix(file, "_test.go") {
				allowedModules = slices.Concat(allowedModules, testModules)
				if room == "testenv" {
					// It sees the relay from outside, in its tests too: what its peers meet there is the library of gateways.
					allowedModules = append(allowedModules, serverLibrary)
				} else {
					allowedRooms = append(allowedRooms, "testenv")
				}
			}
			for _, path := range imports {
				if inside, ok := strings.CutPrefix(path, modulePath+"/"); ok {
					if other, _, _ := strings.Cut(inside, "/"); !slices.Contains(allowedRooms, other) {
						t.Errorf("%s imports the room %s, want one of %v", file, other, allowedRooms)
					}
				} else if isThirdParty(path) && !slices.ContainsFunc(allowedModules, func(m string) bool { return isWithin(path, m) }) {
					t.Errorf("%s imports %s, want one of %v", file, path, allowedModules)
				}
			}
		}
	}
}

func TestWebSocketLibraries_OneFileEach(t *testing.T) {
	for _, tt := range []struct{ room, library string }{
		{"gateway", serverLibrary},
		{"testenv", clientLibrary},
	} {
		var got []string
		for file, imports := range importsOf(t, tt.room) {
			if slices.Contains(imports, tt.library) && !strings.HasSuffix(file, "_test.go") {
				got = append(got, file)
			}
		}
		if len(got) != 1 {
			t.Errorf("files of %s that import %s: got %v, want exactly one", tt.room, tt.library, got)
		}
	}
}

// Nothing beside the rooms has Go code: the table above covers all of it.
func TestEveryGoFileIsInARoom(t *testing.T) {
	entries, err := filepath.Glob(filepath.Join(repository, "*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		name := filepath.Base(entry)
		if _, ok := rooms[name]; ok {
			continue
		}
		for file := range importsOf(t, name) {
			t.Errorf("%s is in no room, want it in one of bus, registry, gateway, testenv, cmd", file)
		}
	}
}

// importsOf returns the import paths of every Go file below a top-level entry
// of the repository, by the file's path from there.
func importsOf(t *testing.T, entry string) map[string][]string {
	t.Helper()
	found := make(map[string][]string)
	err := filepath.WalkDir(filepath.Join(repository, entry), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Ext(path) != ".go" {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(repository, path)
		if err != nil {
			return err
		}
		found[name] = nil
		for _, spec := range file.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			found[name] = append(found[name], imported)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// isThirdParty reports whether an import path is outside the standard library,
// whose first elements have no dot.
func isThirdParty(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return strings.Contains(first, ".")
}

func isWithin(path, module string) bool {
	return path == module || strings.HasPrefix(path, module+"/")
}
