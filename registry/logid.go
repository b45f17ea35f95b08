package registry

import "strings"

// logID makes a server-id, which is hostile text, fit for a log line: the handler
// quotes it, its length is bounded by the gateway.
func logID(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }
