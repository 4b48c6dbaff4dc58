# shellcheck shell=bash
# shellcheck disable=SC2016
# What happens to a container between create and rm.

case_life_create_start_wait_logs() {
  p create --name "$C" --network none "$IMAGE" sh -c 'echo out; echo err >&2; exit 3'
  p start "$C"
  equal 3 "$(p wait "$C")"
  equal out "$(p logs "$C" 2>/dev/null)"
  equal err "$(p logs "$C" 2>&1 >/dev/null)"
  equal 3 "$(p inspect -f '{{.State.ExitCode}}' "$C")"
  p rm "$C"
  refused 'no such container' p logs "$C"
}

case_life_logs_follow() {
  p run -d --name "$C" --network none "$IMAGE" sh -c 'for i in 1 2 3; do echo $i; sleep 0.3; done'
  equal '1 2 3' "$(p logs -f "$C" | xargs)"
}

case_life_stop_and_start_again() {
  up
  catches_term p exec "$C"
  p stop -t 10 "$C"
  equal 0 "$(p inspect -f '{{.State.ExitCode}}' "$C")" 'exit code after TERM'
  p start "$C"
  equal again "$(p exec "$C" echo again)"
}

case_life_stop_needs_kill() {
  p run -d --name "$C" --network none "$IMAGE" sh -c 'trap "" TERM; while :; do sleep 0.1; done'
  p stop -t 1 "$C"
  equal 137 "$(p inspect -f '{{.State.ExitCode}}' "$C")"
}

case_life_kill_with_a_signal() {
  p run -d --name "$C" --network none "$IMAGE" sh -c 'trap "echo got it; exit 9" USR1; echo ready; while :; do sleep 0.1; done'
  eventually 20 output_has ready p logs "$C"
  p kill -s USR1 "$C"
  equal 9 "$(p wait "$C")"
  contains "$(p logs "$C")" 'got it'
}

case_life_restart_keeps_files() {
  up
  p exec "$C" sh -c 'echo kept >/kept'
  p restart -t 5 "$C"
  equal kept "$(p exec "$C" cat /kept)"
}

case_life_restart_policy() {
  p run -d --name "$C" --network none --restart on-failure:2 "$IMAGE" sh -c 'echo run; exit 1'
  eventually 40 output_is 2 p inspect -f '{{.RestartCount}}' "$C"
  eventually 20 output_is exited p inspect -f '{{.State.Status}}' "$C"
  equal 3 "$(p logs "$C" | grep -c run)" 'runs'
}

case_life_pause() {
  local before
  p run -d --name "$C" --network none "$IMAGE" sh -c 'while :; do echo tick; sleep 0.1; done'
  eventually 20 output_has tick p logs "$C"
  p pause "$C"
  equal paused "$(p inspect -f '{{.State.Status}}' "$C")"
  sleep 0.5
  before=$(p logs "$C" | wc -l)
  sleep 1
  equal "$before" "$(p logs "$C" | wc -l)" 'lines while paused'
  refused "state improper" p exec "$C" true
  p unpause "$C"
  eventually 20 eval '(($(podman logs "$C" | wc -l) > before))'
}

case_life_remove_paused() {
  up
  p pause "$C"
  p rm -f -t 0 "$C"
  refused 'no such container' p inspect --type container "$C"
}

case_life_remove_running() {
  up
  refused 'running' p rm "$C"
  p rm -f -t 0 "$C"
}

case_life_ps_and_inspect() {
  local pid
  up
  contains "$(p ps --format '{{.Names}} {{.Status}}')" "$C Up"
  pid=$(p inspect -f '{{.State.Pid}}' "$C")
  [[ -d /proc/$pid ]] || fail "there is no process $pid"
  equal true "$(p inspect -f '{{.State.Running}}' "$C")"
}

case_life_top() {
  up
  # Options of ps, which podman runs in the container: its own way looks through
  # the host's /proc (docs/engines.md).
  contains "$(p top "$C" -o pid,args)" sleep
}

case_life_stats() {
  local seen
  up
  p exec "$C" sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done'
  seen=$(p stats --no-stream --format json "$C")
  contains "$seen" "$C"
  at_least 1 "$(jq -r '.[0].pids' <<<"$seen")" pids
  [[ $(jq -r '.[0].mem_usage' <<<"$seen") != 0B* ]] || fail "no memory used: $seen"
}

case_life_healthcheck() {
  up --health-cmd 'test -e /tmp/well' --health-interval disable --health-retries 1
  code 1 p healthcheck run "$C"
  p exec "$C" touch /tmp/well
  code 0 p healthcheck run "$C"
}

case_life_events() {
  p run --name "$C" --network none "$IMAGE" true
  contains "$(p events --stream=false --filter "container=$C" --format '{{.Status}}')" died
}

case_life_systemd_notify() {
  local pid
  # The other end of the socket; conmon passes READY on as soon as the container runs.
  timeout 30 socat -u "UNIX-RECVFROM:$W/notify,fork" "CREATE:$W/said" &
  pid=$!
  eventually 5 test -S "$W/notify"
  NOTIFY_SOCKET=$W/notify p run -d --name "$C" --network none --sdnotify=conmon "$IMAGE" sleep 100 >/dev/null
  eventually 20 grep -q READY=1 "$W/said"
  kill "$pid"
}

case_life_hooks_dir() {
  mkdir "$W/hooks"
  printf '#!/bin/sh\ncat >%s/state\n' "$W" >"$W/hook"
  chmod +x "$W/hook"
  jq -n --arg path "$W/hook" '{version: "1.0.0", hook: {path: $path}, when: {always: true}, stages: ["createRuntime"]}' \
    >"$W/hooks/test.json"
  p --hooks-dir "$W/hooks" run --rm --network none "$IMAGE" true
  equal creating "$(jq -r .status "$W/state")"
}

case_life_update() {
  up --memory 64m
  p update --memory 96m --cpus 0.5 "$C"
  equal 100663296 "$(p exec "$C" sh -c "$MEMORY_LIMIT")"
}

case_life_checkpoint() {
  up
  # podman looks for criu before it asks the runtime.
  refused CRIU p container checkpoint "$C"
  p exec "$C" true
}
