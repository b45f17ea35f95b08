package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is set by a release build: -ldflags "-X main.version=v1.2.3".
var version string

// versionString returns the version of this program: the one that the build
// was given, else that of its module, else one that names the commit.
func versionString() string {
	info, _ := debug.ReadBuildInfo()
	return describeVersion(version, info)
}

// versionLine returns version, commit and Go version, for `version`.
func versionLine() string {
	info, _ := debug.ReadBuildInfo()
	return fmt.Sprintf("pyrycode-relay %s commit %s %s", describeVersion(version, info), commit(info), runtime.Version())
}

func describeVersion(stamped string, info *debug.BuildInfo) string {
	if stamped != "" {
		return stamped
	}
	if info != nil && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "0.0.0-unknown+" + commit(info)
}

// commit returns the short revision of the build, "-dirty" if it had changes.
func commit(info *debug.BuildInfo) string {
	if info == nil {
		return "unknown"
	}
	settings := make(map[string]string)
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	revision := cmp.Or(settings["vcs.revision"], "unknown")
	revision = revision[:min(len(revision), 12)]
	if settings["vcs.modified"] == "true" {
		revision += "-dirty"
	}
	return revision
}
