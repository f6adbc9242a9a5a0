#!/usr/bin/env bash
# Build the packages, check their metadata, install the wheel in a clean environment, and run the quick start there.
# Nothing is uploaded: that is `twine upload dist/*`, by a person.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "building ..."
"$python" -m venv "$folder/build"
"$folder/build/bin/pip" install -q --disable-pip-version-check build twine
rm -rf dist
"$folder/build/bin/python" -m build -q
"$folder/build/bin/twine" check --strict dist/*

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' diffusers_graft/_version.py)
grep -q "^## \[$version\]" CHANGELOG.md || { echo "CHANGELOG.md has no heading for version $version."; exit 1; }

echo "installing the wheel in a clean environment ..."
"$python" -m venv "$folder/clean"
wheel=$(ls dist/diffusers_graft-"$version"-*.whl)
# torch on its own, before anything else can ask for a larger build of it
"$folder/clean/bin/pip" install -q --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
"$folder/clean/bin/pip" install -q --disable-pip-version-check -c constraints.txt "${wheel}[eval]"

# Outside the checkout, so that what is installed is what runs.
cd "$folder"
clean/bin/diffusers-graft --version
clean/bin/diffusers-graft quickstart --output quickstart
clean/bin/python - <<'PYTHON'
import diffusers_graft as dg
from diffusers_graft import testbed

model = testbed.load()
model.load_graft("quickstart")
print(f"{dg.__version__} from {dg.__file__}: {len(model.graft.plan.edits)} parts replaced")
PYTHON
cd - > /dev/null
ls -l dist
