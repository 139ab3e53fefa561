# Sourced by the scripts beside it, in the root of the repository: installs what is missing.
# Debian and Ubuntu packages through apt-get (with sudo unless root), the rest into .venv.
# PYTHON chooses the Python that .venv is made with.

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "jax_aat needs Python 3.11 or newer, $python is $("$python" --version 2>&1):" \
    "set PYTHON to another one" >&2
  exit 1
}

packages="g++ python3-dev python3-venv libvulkan-dev libvulkan1 mesa-vulkan-drivers
  vulkan-validationlayers spirv-tools"
missing=
if command -v dpkg-query >/dev/null; then
  for package in $packages; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q '^install ok' ||
      missing="$missing $package"
  done
else
  echo "no dpkg here: make sure of the equivalents of:" $packages >&2
fi
if [ -n "$missing" ]; then
  sudo=
  [ "$(id -u)" = 0 ] || sudo=sudo
  echo "installing$missing" >&2
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $missing
fi

# The stamp is as old as the last installation: sources of the native module that are newer need another.
stamp=.venv/installed
if [ ! -e "$stamp" ] ||
  [ -n "$(find csrc shaders cmake CMakeLists.txt pyproject.toml -newer "$stamp" -print -quit)" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  touch .venv/started
  .venv/bin/python -m pip install --quiet --editable '.[test,examples,docs]'
  mv .venv/started "$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"
