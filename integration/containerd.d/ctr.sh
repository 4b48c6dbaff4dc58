# shellcheck shell=bash
# shellcheck disable=SC2016 # scripts are expanded by the shell in the container
# ctr run, exec and task.

case_ctr_run() {
  equal hello "$(ctr_run --rm "$IMAGE:latest" "$C" echo hello)"
}

case_vm_ctr_run_has_a_kernel_of_its_own() {
  local inside
  inside=$(ctr_run --rm "$IMAGE:latest" "$C" uname -r)
  [[ $inside && $inside != "$(uname -r)" ]] || fail "the same kernel: $inside"
}

case_ctr_run_exit_code() {
  code 42 ctr_run --rm "$IMAGE:latest" "$C" sh -c 'exit 42'
}

case_ctr_run_program_that_cannot_start() {
  refused 'executable file not found in $PATH' ctr_run --rm "$IMAGE:latest" "$C" nosuchprogram
  refused 'permission denied' ctr_run --rm "$IMAGE:latest" "$C-2" /etc
}

case_ctr_run_terminal() {
  contains "$(script -qec "ctr -n $CTR_NAMESPACE run --rm -t --runc-binary $RUNTIME $IMAGE:latest $C sh -c 'tty; test -t 2 && echo all'" /dev/null </dev/null)" all
}

case_ctr_run_streams() {
  equal 2000000 "$(ctr_run --rm "$IMAGE:latest" "$C" head -c 2000000 /dev/zero | wc -c)" 'bytes of output'
}

case_ctr_run_options() {
  local seen
  mkdir "$W/v"
  echo one >"$W/v/a"
  seen=$(ctr_run --rm --env K=v --cwd /www --mount "type=bind,src=$W/v,dst=/v,options=rbind:ro" \
    "$IMAGE:latest" "$C" sh -c 'echo $K $(pwd) $(cat /v/a)')
  equal 'v /www one' "$seen"
}

case_ctr_run_read_only() {
  refused 'Read-only file system' ctr_run --rm --read-only "$IMAGE:latest" "$C" touch /x
}

case_ctr_exec() {
  ctr_up
  equal hello "$(c tasks exec --exec-id e1 "$C" echo hello)"
  code 7 c tasks exec --exec-id e2 "$C" sh -c 'exit 7'
  refused 'executable file not found in $PATH' c tasks exec --exec-id e3 "$C" nosuchprogram
  equal 1000 "$(c tasks exec --exec-id e4 --user 1000 "$C" id -u)"
}

case_ctr_exec_kill() {
  ctr_up
  (c tasks exec --exec-id e1 "$C" sleep 1000 || echo $? >"$W/code") &
  eventually 20 output_has 'sleep 1000' c tasks exec --exec-id "p$RANDOM" "$C" ps
  eventually 20 c tasks kill --exec-id e1 -s SIGKILL "$C"
  wait $!
  equal 137 "$(cat "$W/code")"
}

case_ctr_kill_and_wait() {
  ctr_up
  # A shell that has not set its trap yet is process 1, which ignores the signal.
  eventually 20 eval "ctr -n $CTR_NAMESPACE tasks kill -s SIGTERM $C; sleep 0.5; ctr -n $CTR_NAMESPACE tasks ls | grep \"^$C .*STOPPED\""
  c tasks rm "$C"
}

case_ctr_kill_all() {
  ctr_up
  c tasks kill --all -s SIGKILL "$C"
  eventually 20 eval "ctr -n $CTR_NAMESPACE tasks ls | grep \"^$C .*STOPPED\""
  refused 'not found' c tasks kill -s SIGKILL "$C"
  contains "$(c tasks rm "$C" 2>&1)" 137
}

case_ctr_pause_and_resume() {
  ctr_up
  c tasks pause "$C"
  contains "$(c tasks ls | grep "^$C ")" PAUSED
  c tasks resume "$C"
  equal ok "$(c tasks exec --exec-id e1 "$C" echo ok)"
}

case_ctr_ps_and_metrics() {
  local pid
  ctr_up
  pid=$(c tasks ls | awk -v name="$C" '$1 == name {print $2}')
  contains "$(c tasks ps "$C")" "$pid"
  contains "$(c tasks metrics "$C")" memory
}

case_ctr_memory_limit_is_exceeded() {
  code 137 ctr_run --rm --memory-limit 33554432 "$IMAGE:latest" "$C" sh -c 'tail /dev/zero; exit $?'
}

case_ctr_lack_of_memory_is_an_event() {
  local events
  c events >"$W/events" &
  events=$!
  code 137 ctr_run --rm --memory-limit 33554432 "$IMAGE:latest" "$C" tail /dev/zero
  eventually 10 grep "/tasks/oom.*$C" "$W/events"
  kill "$events"
}

case_ctr_run_cni() {
  contains "$(ctr_run --rm --cni "$IMAGE:latest" "$C" ip -4 addr show eth0)" 'inet 10.66.'
}

case_ctr_run_with_network_namespace() {
  local ns="n$BASHPID" seen
  ip netns add "$ns"
  ip link add "h$ns" type veth peer name d0 netns "$ns"
  ip -n "$ns" addr add 10.79.0.1/24 dev d0
  ip -n "$ns" link set d0 up
  seen=$(ctr_run --rm --with-ns "network:/run/netns/$ns" "$IMAGE:latest" "$C" ip addr)
  ip netns del "$ns"
  contains "$seen" 'inet 10.79.0.1'
}

case_ctr_checkpoint() {
  ctr_up
  refused '' c tasks checkpoint "$C"
  equal ok "$(c tasks exec --exec-id e1 "$C" echo ok)"
}
