#!/usr/bin/env bash
# Generates cluster/rpc/v1 from proto/; with --check only tells whether what is committed is current.
# The compiler is the oldest one whose code protobuf 5, 6 and 7 all run (4.25 writes no check of the runtime's version), in an
# environment of its own: grpcio-tools would pull an old protobuf into ours. It has wheels for Python 3.11 and 3.12.
set -eu

cd "$(dirname "$0")/.."
compiler="grpcio-tools==1.62.3"
venv=.venv-proto

if [ "$(cat $venv/installed 2>/dev/null)" != "$compiler" ]; then
    PYTHON="python3.11 python3.12" scripts/install.sh $venv "$compiler" "setuptools<80"
    echo "$compiler" >$venv/installed
fi

generate() {
    mkdir -p "$1"
    PYTHONWARNINGS=ignore $venv/bin/python -m grpc_tools.protoc -Iproto \
        --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" proto/cluster/rpc/v1/*.proto
}

if [ "${1:-}" != --check ]; then
    rm -f cluster/rpc/v1/*_pb2*
    generate .
    exit
fi

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
generate "$fresh"
touch "$fresh/cluster/rpc/v1/__init__.py"
if ! diff -r --brief --exclude=__pycache__ "$fresh/cluster/rpc/v1" cluster/rpc/v1; then
    echo "The generated stubs are not current: run \`make proto\` and commit the result." >&2
    exit 1
fi
