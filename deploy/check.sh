#!/usr/bin/env bash
# Builds the image and runs docker-compose.yml, for real but without Docker: buildah builds, podman runs, and the base
# image is made with debootstrap. Debian, as root, after 'make install'; everything happens in a temporary folder and in
# namespaces that end with this script. What it does not show is in docs/containers.md.
set -euo pipefail
cd "$(dirname "$0")/.."
((EUID == 0)) || { echo "$0: run it as root, for chroots, namespaces and apt-get" >&2; exit 1; }
if [[ ${1:-} != --inside ]]; then
    exec unshare --mount --pid --fork --mount-proc --kill-child "$0" --inside
fi

base=docker.io/library/debian:bookworm-slim
image=guided-sampling-server:cpu
bin=$(realpath "${VENV:-.venv}/bin")
work=$(mktemp -d /var/tmp/guided-check.XXXXXX)
trap 'rm -rf --one-file-system "$work"' EXIT

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

install_packages() {
    local packages=(aardvark-dns buildah debootstrap iproute2 iptables netavark podman runc)
    local states
    states=$(dpkg-query --show --showformat='${db:Status-Status}\n' "${packages[@]}" 2>&1 || true)
    if ! grep --quiet --invert-match --line-regexp installed <<<"$states"; then return; fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "${packages[@]}" >"$work/apt.log"
}

# Images and containers are kept in the temporary folder, nothing in the machine's own store.
configure_podman() {
    local folder
    for folder in /run/netns /dev/shm; do
        mkdir -p "$folder"
        mount -t tmpfs tmpfs "$folder"
    done
    printf '[storage]\ndriver = "overlay"\ngraphroot = "%s"\nrunroot = "%s"\n' "$work/images" "$work/run" >"$work/storage.conf"
    cat >"$work/containers.conf" <<-END
		[containers]
		default_ulimits = ["nofile=10000:10000", "nproc=10000:10000"]
		[network]
		network_backend = "netavark"
		network_config_dir = "$work/networks"
		[engine]
		runtime = "runc"
		cgroup_manager = "cgroupfs"
		tmp_dir = "$work/tmp"
	END
    export CONTAINERS_STORAGE_CONF=$work/storage.conf CONTAINERS_CONF=$work/containers.conf
}

# From the mirror this machine uses.
make_base() {
    local root=$work/root mirror
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' | awk '$2 == "bookworm" { print $1; exit }')
    debootstrap --variant=minbase bookworm "$root" ${mirror:+"$mirror"} >"$work/debootstrap.log"
    apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        grep -E ' bookworm(-updates|-security)? ' >"$root/etc/apt/sources.list" || true
    tar --directory "$root" --create . | podman import --quiet - "$base"
    rm -rf "$root"
}

# What this machine's pip is told (mirrors, local folders, certificates) goes for the build too; its files are at /machine.
configure_pip() {
    {
        echo '[global]'
        "$bin/pip" config list | sed -nE "s/^(global|:env:)\.([a-z-]+)='(.*)'$/\2 = \3/p" |
            sed -E '/^constraint/d; s/\\n/ /g; s#( |file://)/#\1/machine/#g' | awk -F ' = ' '!seen[$1]++'
    } >"$work/pip.conf"
    mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
    local top
    for top in $(grep -oE '/machine/[^/ ]+' "$work/pip.conf" | sort -u); do
        mounts+=(--volume "${top#/machine}:$top:ro")
    done
}

build() {
    buildah bud --quiet --isolation chroot --pull-never --format docker "$@" 2>&1 | tee "$work/build.log" | tail -3
}

say 'Lint the Dockerfiles and the compose file'
"$bin/hadolint" --config deploy/check/hadolint.yaml Dockerfile deploy/check/standins.Dockerfile
REDIS_PASSWORD=x GRAFANA_PASSWORD=x "$bin/docker-compose" --profile '*' config --quiet

say 'Make the base image'
install_packages
configure_podman
make_base

say 'Build the image'
configure_pip
build --tag "$image" "${mounts[@]}" .
for name in valkey prometheus; do
    build --target "$name" --tag "$(awk -v name="$name" '$1 == "image:" && $2 ~ name { print $2 }' docker-compose.yml)" \
        --file deploy/check/standins.Dockerfile deploy/check
done
podman images --format '{{.Repository}}:{{.Tag}} {{.Size}}'

say 'Run it, in a network of its own'
export COMPOSE=$bin/docker-compose DOCKER_HOST=unix://$work/podman.sock
unshare --net "$bin/python" -m pytest --override-ini testpaths=deploy/check -p no:cacheprovider --verbose deploy/check
say 'Done'
