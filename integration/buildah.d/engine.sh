# shellcheck shell=bash
# buildah in the world, with OCI isolation: each RUN step is a container of the runtime.

# b ARGUMENT...: buildah with the runtime of the case.
b() {
  BUILDAH_RUNTIME=$RUNTIME BUILDAH_ISOLATION=oci buildah "$@"
}

# working: a working container named $C.
working() {
  b from --pull-never --name "$C" "$IMAGE" >/dev/null
}

# step ARGUMENT...: runs a command in it.
step() {
  b run --network none "$@"
}

engine_start() {
  # shellcheck source=../podman.d/engine.sh
  . "$INTEGRATION/podman.d/engine.sh"
  write_containers_conf
  make_busybox_image /tmp/busybox.tar
  buildah pull docker-archive:/tmp/busybox.tar
}

engine_stop() {
  buildah rm --all
}

engine_clean() {
  local name
  for name in $(buildah containers --format '{{.ContainerName}}' | grep "^$1"); do
    buildah rm "$name"
  done
  buildah images --format '{{.Name}}' | grep "/$1" | xargs -r buildah rmi -f
}

engine_true() {
  buildah inspect timed >/dev/null 2>&1 || buildah from --pull-never --name timed "$IMAGE"
  BUILDAH_RUNTIME=$1 BUILDAH_ISOLATION=oci buildah run --network none timed -- true
}
