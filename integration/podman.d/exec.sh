# shellcheck shell=bash
# shellcheck disable=SC2016
# podman exec and attach.

case_exec_output_and_exit_code() {
  up
  equal hello "$(p exec "$C" echo hello)"
  code 7 p exec "$C" sh -c 'exit 7'
  code 137 p exec "$C" sh -c 'kill -9 $$'
  code 127 p exec "$C" nosuchprogram
  code 126 p exec "$C" /etc
}

case_exec_streams() {
  local sum
  up
  head -c 300000 /dev/urandom >"$W/in"
  sum=$(sha256sum <"$W/in")
  equal "$sum" "$(p exec -i "$C" sha256sum <"$W/in")"
  equal 2000000 "$(p exec "$C" head -c 2000000 /dev/zero | wc -c)" 'bytes of output'
}

case_exec_user_env_workdir() {
  up
  equal '1000 v /www' "$(p exec --user alice --env K=v --workdir /www "$C" sh -c 'echo $(id -u) $K $(pwd)')"
}

case_exec_privileged() {
  up
  [[ $(p exec "$C" grep CapEff /proc/self/status) != "$(p exec --privileged "$C" grep CapEff /proc/self/status)" ]] ||
    fail 'the same capabilities'
}

case_exec_detached() {
  up
  p exec -d "$C" sh -c 'echo done >/tmp/mark'
  eventually 20 output_is 'done' p exec "$C" cat /tmp/mark
}

case_exec_terminal() {
  up
  contains "$(script -qec "podman exec -it $C sh -c 'tty; test -t 1 && echo all'" /dev/null </dev/null)" all
}

case_exec_at_once() {
  local i
  up
  for i in 1 2 3 4 5 6; do
    (equal "$i" "$(p exec "$C" echo "$i")") &
  done
  for i in 1 2 3 4 5 6; do wait -n || fail 'one of them failed'; done
}

case_exec_in_stopped_container() {
  up
  p stop -t 5 "$C"
  refused 'running' p exec "$C" true
}

case_attach() {
  p create -i --name "$C" --network none "$IMAGE" cat
  equal 'through cat' "$(echo 'through cat' | p start --attach --interactive "$C")"
}

case_attach_to_running() {
  p run -d --name "$C" --network none "$IMAGE" sh -c 'while :; do echo tick; sleep 0.2; done'
  (timeout 10 podman attach --no-stdin --sig-proxy=false "$C" || true) | head -n 2 >"$W/out"
  contains "$(cat "$W/out")" tick
}

case_exec_preserves_descriptors() {
  up
  equal 'in a pipe' "$(echo 'in a pipe' | p exec --preserve-fds 1 "$C" cat /proc/self/fd/3 3<&0 </dev/null)"
  equal out "$(p exec --preserve-fds 2 "$C" sh -c 'echo out >&4' 3</dev/null 4>&1 >/dev/null)"
  echo 'in a file' >"$W/in"
  equal 'in a file' "$(p exec --preserve-fds 1 "$C" sh -c 'cat <&3' 3<"$W/in")"
}
