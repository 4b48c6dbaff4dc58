# shellcheck shell=bash
# podman in the world: configuration, images, clean-up.

# p ARGUMENT...: podman with the runtime of the case.
p() {
  podman --runtime "$RUNTIME" "$@"
}

# run ARGUMENT...: a container that is gone when it ends.
run() {
  p run --rm --network none "$@"
}

# up [OPTION...]: starts a container named $C that waits.
up() {
  p run -d --name "$C" --network none "$@" "$IMAGE" sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done' >/dev/null
}

# What newer podman says about cgroups v1 is not what the cases look for.
export PODMAN_IGNORE_CGROUPSV1_WARNING=yes

write_containers_conf() {
  mkdir -p /etc/containers/containers.conf.d
  cat >/etc/containers/containers.conf <<'TEXT'
[containers]
# What a machine without CAP_SYS_RESOURCE can give.
default_ulimits = ["nofile=1024:1024", "nproc=30000:30000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
TEXT
  # The drop-in that is installed, for the binary under test.
  sed "s|@BIN@/kuasar-runv|$KUASAR|" "$TOP/etc/engines/podman.conf" >/etc/containers/containers.conf.d/kuasar-runv.conf
  echo '{"default": [{"type": "insecureAcceptAnything"}]}' >/etc/containers/policy.json
  echo 'unqualified-search-registries = []' >/etc/containers/registries.conf
  printf '[storage]\ndriver = "overlay"\ngraphroot = "/var/lib/containers/storage"\nrunroot = "/run/containers/storage"\n' \
    >/etc/containers/storage.conf
}

engine_start() {
  write_containers_conf
  make_busybox_image /tmp/busybox.tar
  podman load -i /tmp/busybox.tar
  podman info
}

engine_stop() {
  podman pod rm -fa -t 0
  podman rm -fa -t 0
  podman volume prune -f
}

engine_clean() {
  local tag=$1
  podman pod ps -q --filter "name=^$tag" | xargs -r podman pod rm -f -t 0
  podman ps -aq --filter "name=^$tag" | xargs -r podman rm -f -t 0
  podman network ls -q --filter "name=^$tag" | xargs -r podman network rm -f
  podman volume ls -q --filter "name=^$tag" | xargs -r podman volume rm -f
  podman secret ls --format '{{.Name}}' | grep "^$tag" | xargs -r podman secret rm
  podman images --format '{{.Repository}}' | grep "/$tag" | xargs -r podman rmi -f
}

engine_true() {
  podman --runtime "$1" run --rm "$IMAGE" true
}
