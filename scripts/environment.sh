# Sourced by the other scripts.

# make_environment FOLDER REQUIREMENT... [--then REQUIREMENT...]
# A virtual environment with these requirements, what stands behind --then installed after the rest. It is made again
# only when pyproject.toml or the request changed.

make_environment() {
    local folder=$1 python=${PYTHON:-python3} wanted step=()
    shift
    wanted=$(cat pyproject.toml - <<<"$*" | sha256sum)
    if [ -x "$folder/bin/python" ] && [ "$(cat "$folder/wanted" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "$python is older than Python 3.10; name a newer one: PYTHON=python3.11 $0" >&2
        exit 2
    }
    echo "installing into $folder: $*" >&2
    "$python" -m venv --clear "$folder"
    for requirement in "$@" --then; do
        if [ "$requirement" = --then ]; then
            "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${step[@]}"
            step=()
        else
            step+=("$requirement")
        fi
    done
    echo "$wanted" >"$folder/wanted"
}

# make_modules FOLDER
# What the folder's package-lock.json names, in its node_modules, where npm is here. It is made again only when that file
# changed.
make_modules() {
    local wanted
    wanted=$(sha256sum <"$1/package-lock.json")
    if ! command -v npm >/dev/null || [ "$(cat "$1/node_modules/wanted" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    echo "installing into $1/node_modules" >&2
    (cd "$1" && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error >&2)
    echo "$wanted" >"$1/node_modules/wanted"
}
