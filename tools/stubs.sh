#!/usr/bin/env bash
# Writes the type stub of dear/_C, as it is built, to the file named. Usage: tools/stubs.sh PYTHON FILE
set -euo pipefail
python=$1 file=$2
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A type that is bound later than a function that takes it is written as in C++: dear::Pipeline.
PYTHONPATH=. "$python" -m pybind11_stubgen dear._C --output-dir "$scratch" --print-invalid-expressions-as-is \
  --root-suffix "" 2>"$scratch/log" || { cat "$scratch/log" >&2; exit 1; }
stub=$scratch/dear/_C.pyi
sed -i -E "s/\\bdear::((compress|bindings)::)?//g; s/\\bc10d::Reducer\\b/torch._C._distributed_c10d.Reducer/g" "$stub"
sed -i -E "s/\\*args([,)])/*args: typing.Any\\1/; s/\\*\\*kwargs\\)/**kwargs: typing.Any)/" "$stub"
if grep -n '::' "$stub"; then
  echo "error: these types of the stub have no name in Python: bind them, or name them in tools/stubs.sh." >&2
  exit 1
fi
sed -i '1i # Generated from the compiled module by "make stubs".\n# ruff: noqa' "$stub"
"$python" -m ruff format -q --stdin-filename _C.pyi - <"$stub" >"$file"
