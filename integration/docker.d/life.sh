# shellcheck shell=bash
# shellcheck disable=SC2016
# The life of docker's containers, their files.

case_life_stop_start_restart() {
  up
  catches_term d exec "$C"
  d exec "$C" sh -c 'echo kept >/kept'
  d stop -t 10 "$C"
  equal 0 "$(d inspect -f '{{.State.ExitCode}}' "$C")"
  d start "$C"
  equal kept "$(d exec "$C" cat /kept)"
  d restart -t 5 "$C"
  equal kept "$(d exec "$C" cat /kept)"
}

case_life_kill_and_wait() {
  up
  d kill "$C"
  equal 137 "$(d wait "$C")"
  d rm "$C"
}

case_life_pause() {
  up
  d pause "$C"
  equal paused "$(d inspect -f '{{.State.Status}}' "$C")"
  refused paused d exec "$C" true
  d unpause "$C"
  equal ok "$(d exec "$C" echo ok)"
}

case_life_logs() {
  d_run --name "$C" --network none "$IMAGE" sh -c 'echo out; echo err >&2'
  equal out "$(d logs "$C" 2>/dev/null)"
  equal err "$(d logs "$C" 2>&1 >/dev/null)"
}

case_life_restart_policy() {
  d_run -d --name "$C" --network none --restart on-failure:2 "$IMAGE" sh -c 'echo run; exit 1'
  eventually 60 output_is 2 d inspect -f '{{.RestartCount}}' "$C"
}

case_life_top_and_stats() {
  local seen
  up
  # docker shows the host's processes of the container.
  contains "$(d top "$C")" PID
  at_least 2 "$(d top "$C" | wc -l)" 'lines of top'
  seen=$(d stats --no-stream --format '{{.Name}} {{.PIDs}} {{.MemUsage}}' "$C")
  contains "$seen" "$C"
}

case_life_healthcheck() {
  d_run -d --name "$C" --network none --health-cmd 'test -e /etc/passwd' --health-interval 1s "$IMAGE" sleep 1000
  eventually 30 output_is healthy d inspect -f '{{.State.Health.Status}}' "$C"
}

case_life_copy() {
  local host
  up
  host=$(sha256sum /etc/passwd)
  echo content >"$W/file"
  d cp "$W/file" "$C:/etc/passwd"
  equal content "$(d exec "$C" cat /etc/passwd)"
  equal "$host" "$(sha256sum /etc/passwd)" "the host's /etc/passwd"
  d cp "$C:/www" "$W/www"
  equal 'a web page' "$(cat "$W/www/index.html")"
}

case_life_diff_commit_export() {
  up
  d exec "$C" sh -c 'echo new >/new'
  contains "$(d diff "$C")" 'A /new'
  d commit "$C" "$C-image" >/dev/null
  equal new "$(once "$C-image" cat /new)"
  equal new "$(d export "$C" | tar -xO new)"
}

case_life_volumes() {
  mkdir "$W/v"
  echo one >"$W/v/a"
  up -v "$W/v:/v" -v "$W/v:/ro:ro" -v "$C:/named" --tmpfs /t
  equal one "$(d exec "$C" cat /v/a)"
  d exec "$C" sh -c 'echo two >/v/b; echo three >/named/c; echo four >/t/d'
  equal two "$(cat "$W/v/b")"
  refused 'Read-only' d exec "$C" touch /ro/x
  equal three "$(once -v "$C:/named" "$IMAGE" cat /named/c)"
}

case_life_build() {
  mkdir "$W/context"
  echo copied >"$W/context/file"
  printf 'FROM %s\nCOPY file /file\nRUN cat /file >/made && id -u >>/made && uname -r >/kernel\n' "$IMAGE" >"$W/context/Dockerfile"
  # The classic builder runs its steps with the default runtime.
  d build -q --network none -t "$C" "$W/context" >/dev/null
  equal 'copied 0' "$(once "$C" cat /made | xargs)"
}

# Needs a daemon of its own with another default, so nobody else may run.
case_alone_vm_build_with_default_runtime() {
  local kernel
  end_daemon dockerd
  jq '. + {"default-runtime": "kuasar-runv"}' /etc/docker/daemon.json >"$W/daemon.json"
  cp /etc/docker/daemon.json "$W/before.json"
  cp "$W/daemon.json" /etc/docker/daemon.json
  start_docker
  printf 'FROM %s\nRUN uname -r >/kernel\n' "$IMAGE" >"$W/Dockerfile"
  DOCKER_BUILDKIT=0 d build -q --network none -t "$C" "$W" >/dev/null
  kernel=$(once "$C" cat /kernel)
  [[ $kernel && $kernel != "$(uname -r)" ]] || fail "built with the host's kernel $kernel"
  end_daemon dockerd
  cp "$W/before.json" /etc/docker/daemon.json
  start_docker
}

case_alone_docker_restarts() {
  up --restart always
  end_daemon dockerd
  start_docker
  eventually 30 output_is ok d exec "$C" echo ok
}
