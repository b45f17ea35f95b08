# syntax=docker/dockerfile:1
# The relay as one static binary, run by nobody in particular.
#
#   docker build --build-arg VERSION="$(git describe --tags --always --dirty)" -t pyrycode-relay .
#   docker run --rm -p 8080:8080 pyrycode-relay serve --insecure-listen :8080

FROM golang:1.26 AS build
WORKDIR /src
# Modules first: they change less often than the code.
COPY go.mod go.sum ./
RUN --mount=type=cache,target=/go/pkg/mod go mod download
COPY . .
# Empty: the program names itself by its module.
ARG VERSION=
# A test runs this line as it stands, so it stays one line.
RUN --mount=type=cache,target=/go/pkg/mod --mount=type=cache,target=/root/.cache/go-build CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /out/pyrycode-relay ./cmd/pyrycode-relay

# CA certificates, time zones and an unprivileged user; no shell.
FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /out/pyrycode-relay /pyrycode-relay
USER nonroot:nonroot
# Plain HTTP behind a proxy; with --domain, HTTPS and the port that answers ACME.
EXPOSE 8080 443 80
# Alive, not ready: see /readyz. It asks the port of --insecure-listen; with other listeners, say so at run time.
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 CMD ["/pyrycode-relay", "status", "--live", "--url", "http://127.0.0.1:8080"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/pyrycode-relay"]
