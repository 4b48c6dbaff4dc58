# shellcheck shell=bash
# Images made on the spot from static programs of the distribution: nothing is
# pulled from anywhere.

# make_image FILE NAME CONFIG ROOTFS: packs a directory as a docker archive, which
# podman, docker and containerd all load. CONFIG is the image's `config` as JSON.
make_image() {
  local file=$1 name=$2 config=$3 rootfs=$4 work layer
  work=$(mktemp -d)
  tar -C "$rootfs" --sort=name --mtime=@0 --numeric-owner -cf "$work/layer.tar" .
  layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
  jq -n --argjson config "$config" --arg layer "sha256:$layer" \
    '{architecture: "amd64", os: "linux", config: $config, created: "1970-01-01T00:00:00Z",
      history: [{created: "1970-01-01T00:00:00Z", created_by: "integration"}],
      rootfs: {type: "layers", diff_ids: [$layer]}}' >"$work/config.json"
  jq -n --arg name "$name" '[{Config: "config.json", RepoTags: [$name], Layers: ["layer.tar"]}]' \
    >"$work/manifest.json"
  tar -C "$work" -cf "$file" manifest.json config.json layer.tar
  rm -rf "$work"
}

# copy_program NAME ROOTFS: a program of this machine with its libraries.
copy_program() {
  local program file
  program=$(command -v "$1")
  mkdir -p "$2/usr/bin"
  cp "$program" "$2/usr/bin"
  for file in $(ldd "$program" | grep -oE '/[^ ]+'); do
    mkdir -p "$2$(dirname "$file")"
    cp -L "$file" "$2$file"
  done
}

# The image of nearly all cases: busybox, a few accounts, a web page,
# and socat for what busybox has no program (datagrams).
make_busybox_image() {
  local file=$1 rootfs applet
  rootfs=$(mktemp -d)
  chmod 755 "$rootfs"
  mkdir -p "$rootfs"/{bin,dev,etc,home/alice,proc,root,run,sys,var/log,www}
  mkdir -m 1777 "$rootfs/tmp"
  cp "$(command -v busybox)" "$rootfs/bin/busybox"
  for applet in $(busybox --list); do
    [[ $applet == busybox ]] || ln -s busybox "$rootfs/bin/$applet"
  done
  copy_program socat "$rootfs"
  printf '%s\n' 'root:x:0:0:root:/root:/bin/sh' 'alice:x:1000:1000::/home/alice:/bin/sh' >"$rootfs/etc/passwd"
  printf '%s\n' 'root:x:0:' 'alice:x:1000:' 'staff:x:50:alice' >"$rootfs/etc/group"
  chown 1000:1000 "$rootfs/home/alice"
  echo 'a web page' >"$rootfs/www/index.html"
  make_image "$file" "$IMAGE:latest" \
    '{"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"]}' "$rootfs"
  rm -rf "$rootfs"
}

# The sandbox container of Kubernetes pods: waits, and reaps.
make_pause_image() {
  local file=$1 rootfs
  rootfs=$(mktemp -d)
  chmod 755 "$rootfs"
  cp "$(command -v catatonit)" "$rootfs/catatonit"
  make_image "$file" "$PAUSE_IMAGE:latest" '{"Entrypoint": ["/catatonit", "-P"]}' "$rootfs"
  rm -rf "$rootfs"
}
