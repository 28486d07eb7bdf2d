# One static file. Build it first: cargo build --release -p penstock, then
#   docker build --build-arg BINARY=target/<host>/release/penstock -t penstock .
FROM scratch
ARG BINARY
COPY --chmod=0755 ${BINARY} /penstock
USER 65532:65532
ENTRYPOINT ["/penstock"]
