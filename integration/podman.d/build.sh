# shellcheck shell=bash
# shellcheck disable=SC2016
# podman build with RUN steps in a container of the runtime.

case_build_run_steps() {
  mkdir "$W/context"
  echo copied >"$W/context/file"
  cat >"$W/context/Containerfile" <<TEXT
FROM $IMAGE
COPY file /file
RUN cat /file > /made && echo more >> /made
RUN id -u >> /made
USER alice
RUN id -u > /tmp/who
TEXT
  p build -q --isolation oci --network none -t "localhost/$C" "$W/context"
  equal 'copied more 0 1000' "$(run "localhost/$C" cat /made /tmp/who | xargs)"
}

case_build_run_fails() {
  printf 'FROM %s\nRUN exit 5\n' "$IMAGE" >"$W/Containerfile"
  refused 'exit status 5' p build --isolation oci --network none -t "localhost/$C" "$W"
}
