package main

// What the documents say about the program, checked against the program.

import (
	"cmp"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestREADME_TableIsThatOfTheProgram(t *testing.T) {
	type row struct{ name, def, usage string }
	var got, want []row
	rows := regexp.MustCompile("(?m)^\\| `--([a-z0-9-]+)` \\| (?:`([^`]*)` |([^|`]+) )?\\| (.*) \\|$")
	for _, m := range rows.FindAllStringSubmatch(string(readShipped(t, "README.md")), -1) {
		got = append(got, row{m[1], cmp.Or(m[2], m[3]), m[4]})
	}
	for _, o := range new(config).options("$HOME/.pyrycode-relay/certs", "host name") {
		want = append(want, row{o.name, o.def, o.usage})
	}
	for i := range max(len(got), len(want)) {
		switch {
		case i >= len(want):
			t.Errorf("README: --%s is no flag of the program", got[i].name)
		case i >= len(got):
			t.Errorf("README: no row for --%s", want[i].name)
		case got[i] != want[i]:
			t.Errorf("README, row %d: got %+v, want %+v", i+1, got[i], want[i])
		}
	}
}

// The first screen has the two commands, and the second is what CI runs.
func TestREADME_Commands(t *testing.T) {
	text := string(readShipped(t, "README.md"))
	first := strings.Join(strings.SplitN(text, "\n", 31)[:30], "\n")
	match := regexp.MustCompile(`(?m)^    go run \./cmd/pyrycode-relay (.*?) +#`).FindStringSubmatch(first)
	if match == nil {
		t.Fatal("README: no command that starts a relay in the first 30 lines")
	}
	if _, err := parseConfig(strings.Fields(match[1]), nil); err != nil {
		t.Errorf("README: go run ./cmd/pyrycode-relay %s: %v", match[1], err)
	}
	if !strings.Contains(first, "\n    make test ") {
		t.Error("README: no make test in the first 30 lines")
	}
	if !strings.Contains(string(readShipped(t, ".ci/run")), "\nstep make test\n") {
		t.Error(".ci/run does not run make test")
	}
	// Every other command line of the program in it is one that it takes.
	lines := regexp.MustCompile(`(?m)^    (?:go run \./cmd/pyrycode-relay|bin/pyrycode-relay) (--.*?)(?: &| +#.*)?$`)
	commands := lines.FindAllStringSubmatch(text, -1)
	if len(commands) != 6 {
		t.Errorf("README: %d commands that start a node, want 6", len(commands))
	}
	for _, m := range commands {
		if _, err := parseConfig(strings.Fields(m[1]), nil); err != nil {
			t.Errorf("README: %s: %v", m[1], err)
		}
	}
	for _, step := range smokeSteps {
		if !strings.Contains(text, "  "+step.proves+"\n") {
			t.Errorf("README: smoke's output lacks %q", step.proves)
		}
	}
}

func TestDocuments_LinksLeadSomewhere(t *testing.T) {
	files := []string{"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "deploy/README.md"}
	more, err := filepath.Glob(filepath.Join(repository, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range more {
		files = append(files, "docs/"+filepath.Base(file))
	}
	links := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	for _, file := range files {
		for _, m := range links.FindAllStringSubmatch(string(readShipped(t, file)), -1) {
			if _, err := os.Stat(filepath.Join(repository, filepath.Dir(file), m[1])); err != nil {
				t.Errorf("%s: %v", file, err)
			}
		}
	}
}

// Every test that a guarantee names is there.
func TestGuarantees_AreHeldByTests(t *testing.T) {
	there := make(map[string]bool)
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\)`)
	for _, room := range []string{"bus", "registry", "gateway", "cmd/pyrycode-relay"} {
		files, err := filepath.Glob(filepath.Join(repository, room, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range declared.FindAllSubmatch(text, -1) {
				there[string(m[1])] = true
			}
		}
	}
	for _, page := range []string{"docs/guarantees.md", "docs/links.md"} {
		named := regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(string(readShipped(t, page)), -1)
		if len(named) == 0 {
			t.Errorf("%s names no test", page)
		}
		for _, m := range named {
			if !there[m[1]] {
				t.Errorf("%s names %s, which is not there", page, m[1])
			}
		}
	}
}

// Every event that the code logs stands in docs/operations.md with its level and
// its fields, and no other does.
func TestOperations_EventsAreThoseOfTheCode(t *testing.T) {
	want := eventsInCode(t)
	got := make(map[string]string)
	rows := regexp.MustCompile("(?m)^\\| `([a-z_]+)` \\| ([a-z, ]+) \\| ((?:`[a-z_]+`(?:, )?)*) ?\\|")
	text := string(readShipped(t, "docs/operations.md"))
	for _, m := range rows.FindAllStringSubmatch(text, -1) {
		got[m[1]] = strings.TrimSpace(m[2] + ": " + strings.ReplaceAll(m[3], "`", ""))
	}
	for _, event := range slices.Sorted(maps.Keys(want)) {
		if got[event] != want[event] {
			t.Errorf("docs/operations.md, %s: got %q, want %q", event, got[event], want[event])
		}
	}
	for event := range got {
		if _, ok := want[event]; !ok {
			t.Errorf("docs/operations.md: nobody logs %s", event)
		}
	}
}

// eventsInCode returns "<levels>: <fields>" of every event, by its name.
func eventsInCode(t *testing.T) map[string]string {
	t.Helper()
	found := make(map[string]string)
	for room := range rooms {
		err := filepath.WalkDir(filepath.Join(repository, room), func(path string, d os.DirEntry, err error) error {
			if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") {
				return err
			}
			file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				if event, line, ok := logCall(n); ok {
					if before, ok := found[event]; ok && before != line {
						t.Errorf("%s: %s is logged as %q here and as %q elsewhere", path, event, line, before)
					}
					found[event] = line
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

// logCall takes a call like log.Info("event", "field", value) apart. One that
// gives its level as a value logs warnings and errors.
func logCall(n ast.Node) (event, line string, ok bool) {
	call, ok := n.(*ast.CallExpr)
	if !ok {
		return "", "", false
	}
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || !isLogger(method.X) {
		return "", "", false
	}
	level, args := strings.ToLower(method.Sel.Name), call.Args
	switch level {
	case "debug", "info", "warn", "error":
	case "log":
		level, args = "warn, error", args[2:]
	default:
		return "", "", false
	}
	event = literal(args[0])
	var fields []string
	for i := 1; i < len(args); i += 2 {
		fields = append(fields, literal(args[i]))
	}
	return event, strings.TrimSpace(level + ": " + strings.Join(fields, ", ")), true
}

// isLogger reports whether x is called log, as every logger here.
func isLogger(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return x.Name == "log" || x.Name == "logger"
	case *ast.SelectorExpr:
		return x.Sel.Name == "log"
	}
	return false
}

func literal(x ast.Expr) string {
	if l, ok := x.(*ast.BasicLit); ok && l.Kind == token.STRING {
		if s, err := strconv.Unquote(l.Value); err == nil {
			return s
		}
	}
	return "(not a literal)"
}

// Every metric of the relay stands in docs/operations.md, and no other does.
func TestOperations_MetricsAreThoseOfTheProgram(t *testing.T) {
	_, text := fetch(t, startNode(t).metrics+"/metrics")
	names := func(pattern, text string) []string {
		var names []string
		for _, m := range regexp.MustCompile(pattern).FindAllStringSubmatch(text, -1) {
			names = append(names, m[1])
		}
		slices.Sort(names)
		return slices.Compact(names)
	}
	got := names("(?m)^\\| `(pyrycode_relay_[a-z_]+)`", string(readShipped(t, "docs/operations.md")))
	if want := names(`(?m)^# TYPE (pyrycode_relay_\w+) `, text); !slices.Equal(got, want) {
		t.Errorf("docs/operations.md: got metrics\n%q, want\n%q", got, want)
	}
}
