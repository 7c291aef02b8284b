// Package paddock is a thin Go client of Paddock, the server that loads, serves and unloads language models.
//
// The generated stubs in paddock/v1 are the whole API. This package adds a connection that suits them, errors with
// the reasons of docs/errors.md, and two helpers that read a stream to its end.
package paddock
