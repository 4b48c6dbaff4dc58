# shellcheck shell=bash
# shellcheck disable=SC2016 # scripts are expanded by the shell in the container
# podman run: streams, exit codes, users, the environment.

case_run_output_and_exit_code() {
  equal "hello" "$(run "$IMAGE" echo hello)"
  code 42 run "$IMAGE" sh -c 'exit 42'
}

case_vm_run_has_a_kernel_of_its_own() {
  local inside
  inside=$(run "$IMAGE" uname -r)
  [[ $inside && $inside != "$(uname -r)" ]] || fail "the same kernel: $inside"
}

case_run_program_that_cannot_start() {
  code 127 run "$IMAGE" nosuchprogram
  contains "$OUT" 'executable file not found in $PATH'
  code 127 run "$IMAGE" /no/such/program
  code 126 run "$IMAGE" /etc
}

case_run_signal_is_137() {
  code 137 run --init "$IMAGE" sh -c 'kill -9 $$'
  code 143 run --init "$IMAGE" sh -c 'kill -15 $$'
}

case_run_streams() {
  local sum
  head -c 300000 /dev/urandom >"$W/in"
  sum=$(sha256sum <"$W/in")
  equal "$sum" "$(run -i "$IMAGE" sha256sum <"$W/in")"
  run "$IMAGE" sh -c 'head -c 2000000 /dev/zero; echo error >&2' >"$W/out" 2>"$W/err"
  equal 2000000 "$(stat -c %s "$W/out")" 'bytes of output'
  contains "$(cat "$W/err")" error
}

case_run_terminal() {
  # script(1) gives podman a terminal.
  local seen
  seen=$(script -qec "podman --runtime $RUNTIME run --rm -it --network none $IMAGE sh -c 'tty; stty size; test -t 2 && echo all'" /dev/null </dev/null)
  contains "$seen" '/dev/pts/0'
  contains "$seen" 'all'
}

case_run_init() {
  contains "$(run --init "$IMAGE" cat /proc/1/cmdline | tr '\0' ' ')" init
}

case_run_user_and_groups() {
  equal '1000 1000 50' "$(run --user alice --group-add staff "$IMAGE" sh -c 'echo $(id -u) $(id -G | tr " " "\n" | sort -rn | tr "\n" " ")')"
  equal '12:34' "$(run --user 12:34 "$IMAGE" sh -c 'echo $(id -u):$(id -g)')"
  refused 'unable to find user' run --user nobodyhere "$IMAGE" true
}

case_run_environment_workdir_entrypoint() {
  equal 'b /www x y' "$(run --env A=b --workdir /www --entrypoint sh "$IMAGE" -c 'echo $A $(pwd) $0 $1' x y)"
}

case_run_hostname_and_hosts() {
  local seen
  seen=$(run --hostname somewhere --add-host there:10.1.2.3 "$IMAGE" sh -c 'hostname; cat /etc/hosts')
  contains "$seen" somewhere
  contains "$seen" '10.1.2.3'
}

case_run_annotation_and_label() {
  up --annotation org.example.a=b --label l=m
  equal 'm' "$(p inspect -f '{{.Config.Labels.l}}' "$C")"
  contains "$(p inspect "$C")" org.example.a
}

case_run_read_only() {
  local seen
  seen=$(run --read-only "$IMAGE" sh -c 'touch /x; touch /tmp/y && echo tmp is writable' 2>&1)
  contains "$seen" 'Read-only file system'
  contains "$seen" 'tmp is writable'
}

case_run_shm_size() {
  equal 32768 "$(run --shm-size 32m "$IMAGE" sh -c 'df -k /dev/shm | awk "END {print \$2}"')"
}

case_run_several_at_once() {
  local i
  for i in 1 2 3 4; do
    (equal "$i" "$(run "$IMAGE" echo "$i")") &
  done
  for i in 1 2 3 4; do wait -n || fail 'one of them failed'; done
}

case_run_preserves_descriptors() {
  equal 'in a pipe' "$(echo 'in a pipe' | run --preserve-fds 1 "$IMAGE" sh -c 'cat <&3' 3<&0 </dev/null)"
}
