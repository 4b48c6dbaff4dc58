# shellcheck shell=bash
# shellcheck disable=SC2016 # scripts are expanded by the shell in the container
# buildah run, build and commit.

case_run() {
  working
  equal hello "$(step "$C" -- echo hello)"
  code 7 step "$C" -- sh -c 'exit 7'
}

case_vm_run_has_a_kernel_of_its_own() {
  local inside
  working
  inside=$(step "$C" -- uname -r)
  [[ $inside && $inside != "$(uname -r)" ]] || fail "the same kernel: $inside"
}

case_run_keeps_files() {
  local place
  working
  step "$C" -- sh -c 'echo made >/made'
  equal made "$(step "$C" -- cat /made)"
  place=$(b mount "$C")
  equal made "$(cat "$place/made")"
  b umount "$C"
}

case_run_user_env_workdir_volume() {
  working
  mkdir "$W/v"
  echo one >"$W/v/a"
  equal '1000 v /www one' "$(step --user alice --env K=v --workingdir /www -v "$W/v:/v" "$C" -- sh -c 'echo $(id -u) $K $(pwd) $(cat /v/a)')"
}

case_run_streams() {
  local sum
  working
  head -c 300000 /dev/urandom >"$W/in"
  sum=$(sha256sum <"$W/in")
  equal "$sum" "$(step "$C" -- sha256sum <"$W/in")"
  equal 2000000 "$(step "$C" -- head -c 2000000 /dev/zero | wc -c)" 'bytes of output'
}

case_run_terminal() {
  working
  contains "$(script -qec "BUILDAH_RUNTIME=$RUNTIME buildah run --isolation oci --network none --tty $C -- sh -c 'test -t 1 && echo all'" /dev/null </dev/null)" all
}

case_run_program_that_cannot_start() {
  working
  refused 'executable file not found in $PATH' step "$C" -- nosuchprogram
}

case_run_capabilities() {
  working
  step "$C" -- chown 1 /tmp
  refused 'not permitted' step --cap-drop CAP_CHOWN "$C" -- chown 2 /tmp
}

case_run_with_network() {
  working
  contains "$(b run "$C" -- ip -4 addr show eth0)" 'inet 10.88.'
}

case_build() {
  echo copied >"$W/file"
  cat >"$W/Containerfile" <<TEXT
FROM $IMAGE
COPY file /file
RUN cat /file >/made && echo more >>/made
WORKDIR /home/alice
USER alice
RUN id -u >who
TEXT
  b build -q --network none --pull-never -t "localhost/$C" "$W"
  b from --pull-never --name "$C" "localhost/$C" >/dev/null
  equal 'copied more 1000' "$(step "$C" -- cat /made who | xargs)"
}

case_build_fails() {
  printf 'FROM %s\nRUN exit 5\n' "$IMAGE" >"$W/Containerfile"
  refused 'exit status 5' b build --network none --pull-never -t "localhost/$C" "$W"
}

case_commit() {
  working
  step "$C" -- sh -c 'echo new >/new'
  b commit -q "$C" "localhost/$C"
  b from --pull-never --name "$C-2" "localhost/$C" >/dev/null
  equal new "$(step "$C-2" -- cat /new)"
}
