# Sourced by the other scripts, from the repository root: makes .venv once and brings it up to date with pyproject.toml.
# VENV_OPTIONS=--system-site-packages lets it see what the system has, such as a Jetson's TensorRT.
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version) found; expected: Python 3.11 or newer; fix: PYTHON=python3.11 $0" >&2
    exit 1
}
if ! cmp -s pyproject.toml .venv/installed-pyproject.toml; then
    "$python" -m venv ${VENV_OPTIONS:-} .venv
    .venv/bin/pip install --quiet --disable-pip-version-check --editable '.[export,test]'
    cp pyproject.toml .venv/installed-pyproject.toml
fi
