# shellcheck shell=bash
# shellcheck disable=SC2016 # scripts are expanded by the shell in the container
# docker run and exec.

case_run_output_and_exit_code() {
  equal hello "$(once "$IMAGE" echo hello)"
  code 42 once "$IMAGE" sh -c 'exit 42'
}

case_vm_run_has_a_kernel_of_its_own() {
  local inside
  inside=$(once "$IMAGE" uname -r)
  [[ $inside && $inside != "$(uname -r)" ]] || fail "the same kernel: $inside"
}

case_run_program_that_cannot_start() {
  code 127 once "$IMAGE" nosuchprogram
  code 126 once "$IMAGE" /etc
}

case_run_streams() {
  local sum
  head -c 300000 /dev/urandom >"$W/in"
  sum=$(sha256sum <"$W/in")
  equal "$sum" "$(once -i "$IMAGE" sha256sum <"$W/in")"
  equal 2000000 "$(once "$IMAGE" head -c 2000000 /dev/zero | wc -c)" 'bytes of output'
}

case_run_terminal() {
  contains "$(script -qec "docker run --runtime $(docker_runtime) --rm -it --network none $IMAGE sh -c 'tty; test -t 2 && echo all'" /dev/null </dev/null)" all
}

case_run_options() {
  equal '1000 v /www host' "$(once --user alice --env K=v --workdir /www --hostname host "$IMAGE" sh -c 'echo $(id -u) $K $(pwd) $(hostname)')"
  equal 99 "$(once --ulimit nofile=99:99 "$IMAGE" sh -c 'ulimit -n')"
  refused 'Read-only' once --read-only "$IMAGE" touch /x
}

case_run_detached_from_terminal() {
  d_run -dit --name "$C" --network none "$IMAGE" sh >/dev/null
  equal ok "$(d exec "$C" echo ok)"
}

case_exec() {
  up
  equal hello "$(d exec "$C" echo hello)"
  code 7 d exec "$C" sh -c 'exit 7'
  code 126 d exec "$C" nosuchprogram
  equal '1000 v /www' "$(d exec --user alice --env K=v --workdir /www "$C" sh -c 'echo $(id -u) $K $(pwd)')"
  equal 'to cat' "$(echo 'to cat' | d exec -i "$C" cat)"
  contains "$(script -qec "docker exec -it $C sh -c 'tty; test -t 1 && echo all'" /dev/null </dev/null)" all
}

case_attach() {
  d_run -di --name "$C" --network none "$IMAGE" sh -c 'read -r x; echo "got $x"' >/dev/null
  contains "$( (echo line; sleep 3) | timeout 30 docker attach "$C")" 'got line'
}

case_security() {
  equal '0000000000000000' "$(once --cap-drop all "$IMAGE" awk '/CapEff/ {print $2}' /proc/self/status)"
  equal 1 "$(once --security-opt no-new-privileges "$IMAGE" awk '/NoNewPrivs/ {print $2}' /proc/self/status)"
  equal 2 "$(once "$IMAGE" awk '/^Seccomp:/ {print $2}' /proc/self/status)"
}

# In a VM the guest's root is complete, whatever the machine's lacks.
case_vm_security_privileged() {
  equal ok "$(once --privileged "$IMAGE" sh -c 'mount -t tmpfs t /tmp && echo ok')"
}

case_limits() {
  up --memory 64m --cpus 0.5 --pids-limit 64
  equal 67108864 "$(d exec "$C" sh -c "$MEMORY_LIMIT")"
  d update --memory 96m --memory-swap 192m "$C"
  equal 100663296 "$(d exec "$C" sh -c "$MEMORY_LIMIT")"
}

case_limits_memory_is_exceeded() {
  code 137 once --memory 32m --memory-swap 32m "$IMAGE" sh -c 'tail /dev/zero; exit $?'
}

case_run_lack_of_memory_is_reported() {
  code 137 d_run --name "$C" --network none --memory 32m --memory-swap 32m "$IMAGE" tail /dev/zero
  equal '137 true' "$(d inspect -f '{{.State.ExitCode}} {{.State.OOMKilled}}' "$C")"
}
