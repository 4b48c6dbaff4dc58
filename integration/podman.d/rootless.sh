# shellcheck shell=bash
# shellcheck disable=SC2016 # scripts are expanded by the shell in the container
# podman without root: an account of the world, its own storage.

# as_user COMMAND...: as the account of the case, with the case's runtime.
as_user() {
  setpriv --reuid "$ROOTLESS" --regid "$ROOTLESS" --clear-groups --reset-env \
    env HOME="$W/home" XDG_RUNTIME_DIR="$W/run" PATH="$PATH" "$@"
}

# rp ARGUMENT...: podman of that account.
rp() {
  (cd "$W" && as_user podman --runtime "$RUNTIME" "$@")
}

# Makes the account and loads the image into its storage.
rootless_up() {
  ROOTLESS=$((20000 + BASHPID % 10000))
  chmod 711 "$W"
  mkdir -p "$W/home" "$W/run"
  chown "$ROOTLESS:$ROOTLESS" "$W/home" "$W/run"
  chmod 700 "$W/run"
  (
    flock 9
    echo "u$ROOTLESS:x:$ROOTLESS:$ROOTLESS::$W/home:/bin/sh" >>/etc/passwd
    echo "u$ROOTLESS:x:$ROOTLESS:" >>/etc/group
    echo "u$ROOTLESS:$((ROOTLESS * 65536)):65536" >>/etc/subuid
    echo "u$ROOTLESS:$((ROOTLESS * 65536)):65536" >>/etc/subgid
  ) 9>/tmp/accounts.lock
  chmod 644 /tmp/busybox.tar
  rp load -q -i /tmp/busybox.tar
  trap 'rp rm -fa -t 0 >/dev/null 2>&1 || true; rp unshare rm -rf "$W/home/.local" || true; rm -rf "$W"' EXIT
}

case_rootless_run() {
  rootless_up
  equal hello "$(rp run --rm --network none "$IMAGE" echo hello)"
  code 42 rp run --rm --network none "$IMAGE" sh -c 'exit 42'
  equal 0 "$(rp run --rm --network none "$IMAGE" id -u)"
}

case_rootless_exec_and_stop() {
  rootless_up
  rp run -d --name "$C" --network none "$IMAGE" sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done' >/dev/null
  equal ok "$(rp exec "$C" echo ok)"
  catches_term rp exec "$C"
  rp stop -t 10 "$C"
  equal 0 "$(rp inspect -f '{{.State.ExitCode}}' "$C")"
}

case_rootless_volume() {
  rootless_up
  mkdir "$W/home/v"
  chown "$ROOTLESS:$ROOTLESS" "$W/home/v"
  rp run --rm --network none -v "$W/home/v:/v" "$IMAGE" sh -c 'echo one >/v/a'
  equal one "$(cat "$W/home/v/a")"
  equal "$ROOTLESS" "$(stat -c %u "$W/home/v/a")"
}

case_rootless_network() {
  rootless_up
  contains "$(rp run --rm --network slirp4netns "$IMAGE" ip -4 addr show tap0)" 'inet 10.0.2.100'
}

case_rootless_publish_tcp() {
  rootless_up
  rp run -d --name "$C" --network slirp4netns -p 127.0.0.1::80 "$IMAGE" httpd -f -h /www >/dev/null
  eventually 20 output_is 'a web page' curl -sS --max-time 5 "http://$(rp port "$C" 80)"
}

case_rootless_publish_udp() {
  local port
  rootless_up
  rp run -d --name "$C" --network slirp4netns -p 127.0.0.1::9999/udp "$IMAGE" socat UDP-RECVFROM:9999,fork EXEC:cat >/dev/null
  port=$(rp port "$C" 9999/udp)
  eventually 20 output_is ping eval "echo ping | socat -t 2 - UDP:$port"
}

case_rootless_publish_bridge() {
  local port
  rootless_up
  rp run -d --name "$C" --network bridge -p 127.0.0.1::80 -p 127.0.0.1::9999/udp "$IMAGE" \
    sh -c 'httpd -h /www; exec socat UDP-RECVFROM:9999,fork EXEC:cat' >/dev/null
  eventually 20 output_is 'a web page' curl -sS --max-time 5 "http://$(rp port "$C" 80)"
  port=$(rp port "$C" 9999/udp)
  eventually 20 output_is ping eval "echo ping | socat -t 2 - UDP:$port"
}
