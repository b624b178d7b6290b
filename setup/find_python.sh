#!/bin/sh
# Print the path of a Python that Longhaul can use, or print one line on standard error about what is missing (exit 2).
#   sh setup/find_python.sh [PYTHON]     PYTHON: the only one to try

enough='import sys; sys.exit(sys.version_info < (3, 11))'
version='import sys; print("%d.%d.%d" % sys.version_info[:3])'

if [ -n "$1" ]; then
    set -- "$1"
else
    set -- python3 python3.13 python3.12 python3.11
fi

for candidate in "$@"; do
    if "$candidate" -c "$enough" >/dev/null 2>&1; then
        command -v "$candidate"
        exit 0
    fi
done

found=$("$1" -c "$version" 2>/dev/null) && found="$1 is $found" || found="$1 does not run here"
echo "error: Longhaul needs Python 3.11 or newer, but $found: install one, or name it: make PYTHON=/path/to/python3.12" >&2
exit 2
