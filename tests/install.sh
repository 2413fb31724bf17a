#!/bin/sh
# Have what the tests need beside Python packages: a C++ compiler for compiled networks, a browser for the page.
# BIN (optional): folder of the environment's commands.
set -eu
bin=${1:-.venv/bin}

any() { for name in "$@"; do if command -v "$name" >/dev/null; then return 0; fi; done; return 1; }
root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }
apt_install() {
    command -v apt-get >/dev/null && root true 2>/dev/null || return 1
    echo "installing $* with apt-get (for the tests)"
    root apt-get update -qq && root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if ! any "${CXX:-g++}" g++ clang++ && ! apt_install g++ libc6-dev python3-dev; then
    echo "no C++ compiler for the tests of compiled networks: install one (Debian: apt-get install g++ python3-dev)" >&2
    exit 1
fi
if ! any chromium chromium-browser google-chrome google-chrome-stable && ! apt_install chromium && ! "$bin/playwright" install chromium; then
    echo "no browser for the tests of the page: install chromium (Debian: apt-get install chromium)" >&2
    exit 1
fi
