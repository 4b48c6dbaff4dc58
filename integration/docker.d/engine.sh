# shellcheck shell=bash
# docker in the world: a containerd and a dockerd of its own, images, clean-up.

export DOCKER_HOST=unix:///run/docker.sock

# d ARGUMENT...: docker.
d() {
  docker "$@"
}

# The name of the runtime in daemon.json.
docker_runtime() {
  if on_runc; then echo runc; else echo kuasar-runv; fi
}

# d_run [OPTION...]: docker run with the runtime of the case.
d_run() {
  d run --runtime "$(docker_runtime)" "$@"
}

# once [OPTION...]: a container without a network that is gone when it ends.
once() {
  d_run --rm --network none "$@"
}

# up [OPTION...]: starts a container named $C that waits.
up() {
  d_run -d --name "$C" --network none "$@" "$IMAGE" sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done' >/dev/null
}

# web_up [OPTION...]: like up, with a web server and a network.
web_up() {
  d_run -d --name "$C" "$@" "$IMAGE" httpd -f -h /www >/dev/null
}

get() {
  curl -sS --max-time 5 "$1"
}

start_docker() {
  start_daemon dockerd dockerd --containerd /run/containerd/containerd.sock --data-root /var/lib/docker \
    --exec-root /run/docker --pidfile /run/docker-own.pid --host "$DOCKER_HOST"
  eventually 60 docker version
}

engine_start() {
  # The snippet that is shipped, for the binary under test.
  sed "s|@BIN@/kuasar-runv|$KUASAR|" "$TOP/etc/engines/docker.json" >/etc/docker/daemon.json
  printf 'version = 2\nroot = "/var/lib/containerd"\nstate = "/run/containerd"\ndisabled_plugins = ["io.containerd.grpc.v1.cri"]\n' \
    >/etc/containerd/config.toml
  make_busybox_image /tmp/busybox.tar
  start_daemon containerd containerd --config /etc/containerd/config.toml
  eventually 30 test -S /run/containerd/containerd.sock
  start_docker
  docker load -i /tmp/busybox.tar
}

engine_stop() {
  end_daemon dockerd
  end_daemon containerd
}

engine_clean() {
  local tag=$1
  docker ps -aq --filter "name=^/$tag" | xargs -r docker rm -f -v
  docker network ls -q --filter "name=^$tag" | xargs -r docker network rm
  docker volume ls -q --filter "name=^$tag" | xargs -r docker volume rm -f
  docker images --format '{{.Repository}}' | grep "^$tag" | xargs -r docker rmi -f
}

engine_true() {
  export RUNTIME_NAME=${1##*/}
  d_run --rm "$IMAGE" true
}
