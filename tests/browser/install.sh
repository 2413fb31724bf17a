#!/bin/sh
# Have a browser that the tests of the page can use; BIN (optional): folder of the environment's commands.
set -eu
bin=${1:-.venv/bin}

for name in chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" >/dev/null; then exit 0; fi
done

root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi; }

if command -v apt-get >/dev/null && root true 2>/dev/null; then
    echo "installing chromium with apt-get (the tests of the page run in it)"
    root apt-get update -qq && root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null && exit 0
fi
if "$bin/playwright" install chromium; then exit 0; fi
echo "no browser for the tests of the page: install chromium (Debian: apt-get install chromium)" >&2
exit 1
