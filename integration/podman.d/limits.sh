# shellcheck shell=bash
# shellcheck disable=SC2016
# Security and resources.

case_limits_capabilities() {
  equal '0000000000000401' "$(run --cap-drop all --cap-add CHOWN,NET_BIND_SERVICE "$IMAGE" awk '/CapEff/ {print $2}' /proc/self/status)"
  equal '0000000000000000' "$(run --cap-drop all "$IMAGE" awk '/CapEff/ {print $2}' /proc/self/status)"
  code 1 run --cap-drop CHOWN "$IMAGE" chown 1 /tmp
}

case_limits_privileged() {
  # /dev of the machine becomes devices of the container.
  equal ok "$(run --privileged "$IMAGE" sh -c 'mount -t tmpfs t /tmp && echo ok')"
}

case_limits_no_new_privileges() {
  equal 1 "$(run --security-opt no-new-privileges "$IMAGE" awk '/NoNewPrivs/ {print $2}' /proc/self/status)"
}

case_limits_seccomp() {
  equal 2 "$(run "$IMAGE" awk '/^Seccomp:/ {print $2}' /proc/self/status)" 'the default profile'
  equal 0 "$(run --security-opt seccomp=unconfined "$IMAGE" awk '/^Seccomp:/ {print $2}' /proc/self/status)"
  echo '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}' >"$W/seccomp.json"
  refused 'not permitted' run --security-opt "seccomp=$W/seccomp.json" "$IMAGE" mkdir /x
}

case_limits_masked_paths() {
  equal 0 "$(run "$IMAGE" sh -c 'wc -c </proc/keys')"
  equal 0 "$(run "$IMAGE" sh -c 'ls /sys/firmware | wc -l')"
}

case_limits_sysctl() {
  equal 5 "$(run --sysctl net.ipv4.ip_default_ttl=5 "$IMAGE" cat /proc/sys/net/ipv4/ip_default_ttl)"
  equal 4097 "$(run --sysctl kernel.msgmax=4097 "$IMAGE" cat /proc/sys/kernel/msgmax)"
}

case_limits_ulimit() {
  equal 99 "$(run --ulimit nofile=99:99 --ulimit nproc=30000:30000 "$IMAGE" sh -c 'ulimit -n')"
}

case_limits_memory() {
  local bytes
  up --memory 64m
  bytes=$(p exec "$C" sh -c "$MEMORY_LIMIT")
  equal 67108864 "$bytes"
}

case_limits_memory_is_exceeded() {
  code 137 run --memory 32m --memory-swap 32m "$IMAGE" sh -c 'tail /dev/zero; exit $?'
}

case_limits_oom_is_reported() {
  # What conmon does when it hears of it: versions from 2.1 on leave a file where they
  # were started, which podman 4.3 does not look for there, so it says false.
  cd "$W" || exit
  p run --name "$C" --network none --memory 32m --memory-swap 32m "$IMAGE" tail /dev/zero || true
  equal 137 "$(p inspect -f '{{.State.ExitCode}}' "$C")"
  [[ -e $W/oom || $(p inspect -f '{{.State.OOMKilled}}' "$C") == true ]] || fail 'conmon has not heard of it'
}

case_limits_cpus_and_pids() {
  up --cpus 0.5 --pids-limit 64
  p exec "$C" true
  refused 'fork' p exec "$C" sh -c 'for i in $(seq 100); do sleep 5 & done'
}

case_limits_cpuset() {
  equal 0 "$(run --cpuset-cpus 0 "$IMAGE" awk '/Cpus_allowed_list/ {print $2}' /proc/self/status)"
}

case_limits_user_namespace() {
  equal '0 1000 500' "$(run --uidmap 0:1000:500 "$IMAGE" sh -c 'echo $(cat /proc/self/uid_map)')"
  equal root "$(run --uidmap 0:1000:500 "$IMAGE" whoami)"
}

case_limits_systemd_mode() {
  local seen
  seen=$(run --systemd always "$IMAGE" sh -c 'grep -c " /run tmpfs" /proc/mounts; echo $container')
  contains "$seen" 1
  contains "$seen" podman
}

case_limits_device() {
  equal 4 "$(run --device /dev/zero:/dev/nothing "$IMAGE" sh -c 'head -c 4 /dev/nothing | wc -c')"
}
