# shellcheck shell=bash
# shellcheck disable=SC2016
# Kubernetes pods over CRI.

# pod_config [JQ]: the configuration of the case's pod, changed by a jq filter.
pod_config() {
  jq -n --arg name "$C" --arg dir "$W/logs" \
    '{metadata: {name: $name, uid: $name, namespace: "cases"}, hostname: "pod-host", log_directory: $dir,
      labels: {case: $name}, linux: {cgroup_parent: "/kubepods",
      security_context: {namespace_options: {network: "POD", pid: "CONTAINER", ipc: "POD"}}}}' | jq "${1:-.}"
}

handler() {
  if on_runc; then echo runc; else echo kuasar-runv; fi
}

# pod_up [JQ]: runs a sandbox; its id is in POD, its configuration in POD_CONFIG.
pod_up() {
  mkdir -p "$W/logs"
  POD_CONFIG=$(pod_config "${1:-.}")
  POD=$(cri RunPodSandbox "$(jq -n --argjson config "$POD_CONFIG" --arg handler "$(handler)" \
    '{config: $config, runtime_handler: $handler}')" | jq -re .pod_sandbox_id)
}

# container_create NAME JQ COMMAND...: prints the id of a new container of the pod.
container_create() {
  local name=$1 filter=$2 config
  shift 2
  config=$(jq -n --arg name "$name" --arg image "$IMAGE:latest" --args \
    '{metadata: {name: $name}, image: {image: $image}, command: $ARGS.positional, log_path: ($name + ".log"),
      linux: {security_context: {namespace_options: {pid: "CONTAINER"}}}}' -- "$@" | jq "$filter")
  cri CreateContainer "$(jq -n --arg pod "$POD" --argjson config "$config" --argjson sandbox "$POD_CONFIG" \
    '{pod_sandbox_id: $pod, config: $config, sandbox_config: $sandbox}')" | jq -re .container_id
}

# container_up NAME JQ COMMAND...: the same, started.
container_up() {
  local id
  id=$(container_create "$@") || return
  container_start "$id" || return
  echo "$id"
}

container_start() {
  cri StartContainer "{\"container_id\": \"$1\"}" >/dev/null
}

container_stop() {
  cri StopContainer "{\"container_id\": \"$1\", \"timeout\": ${2:-5}}" >/dev/null
}

container_remove() {
  cri RemoveContainer "{\"container_id\": \"$1\"}" >/dev/null
}

# container_status ID FIELD
container_status() {
  local answer
  answer=$(cri ContainerStatus "{\"container_id\": \"$1\"}") && jq -r ".status | .$2" <<<"$answer"
}

# in_container ID COMMAND...: prints its output; ends with its exit code.
in_container() {
  local id=$1 answer
  shift
  answer=$(cri ExecSync "$(jq -n --arg id "$id" --args '{container_id: $id, cmd: $ARGS.positional, timeout: 30}' -- "$@")") ||
    return 99
  jq -r .stdout <<<"$answer" | base64 -d
  jq -r .stderr <<<"$answer" | base64 -d >&2
  return "$(jq .exit_code <<<"$answer")"
}

pod_ip() {
  cri PodSandboxStatus "{\"pod_sandbox_id\": \"$POD\"}" | jq -r .status.network.ip
}

case_pod_and_container() {
  local id
  pod_up
  id=$(container_up web . httpd -f -h /www)
  equal CONTAINER_RUNNING "$(container_status "$id" state)"
  equal pod-host "$(in_container "$id" hostname)"
  equal 'a web page' "$(curl -sS --max-time 5 "http://$(pod_ip)")"
  container_stop "$id"
  equal CONTAINER_EXITED "$(container_status "$id" state)"
  container_remove "$id"
  cri StopPodSandbox "{\"pod_sandbox_id\": \"$POD\"}" >/dev/null
  equal SANDBOX_NOTREADY "$(cri PodSandboxStatus "{\"pod_sandbox_id\": \"$POD\"}" | jq -r .status.state)"
  cri RemovePodSandbox "{\"pod_sandbox_id\": \"$POD\"}" >/dev/null
}

case_pod_several_containers() {
  local web other
  pod_up
  web=$(container_up web . httpd -f -h /www)
  other=$(container_up other . sleep 1000)
  equal 'a web page' "$(in_container "$other" wget -q -O - http://127.0.0.1)"
  in_container "$web" sh -c 'echo shared >/dev/shm/x'
  equal shared "$(in_container "$other" cat /dev/shm/x)"
  lacks "$(in_container "$other" ps)" httpd
}

case_vm_pod_has_one_kernel() {
  local one two
  pod_up
  one=$(container_up one . sleep 1000)
  two=$(container_up two . sleep 1000)
  equal "$(in_container "$one" cat /proc/sys/kernel/random/boot_id)" "$(in_container "$two" cat /proc/sys/kernel/random/boot_id)"
  [[ $(in_container "$one" uname -r) != "$(uname -r)" ]] || fail "the host's kernel"
}

case_pod_shares_pids() {
  local one two
  local share='.linux.security_context.namespace_options.pid = "POD"'
  pod_up "$share"
  one=$(container_up one "$share" sleep 1234)
  two=$(container_up two "$share" sleep 1000)
  contains "$(in_container "$two" ps)" 'sleep 1234'
  container_stop "$one" 0
  equal ok "$(in_container "$two" echo ok)"
}

case_pod_container_restarts() {
  local first second
  pod_up
  first=$(container_up one . sh -c 'exit 3')
  eventually 20 output_is CONTAINER_EXITED container_status "$first" state
  equal 3 "$(container_status "$first" exit_code)"
  container_remove "$first"
  second=$(container_up one '.metadata.attempt = 1' sleep 1000)
  equal ok "$(in_container "$second" echo ok)"
}

case_pod_exit_codes_and_reasons() {
  local id
  pod_up
  id=$(container_up ok . true)
  eventually 20 output_is Completed container_status "$id" reason
  id=$(container_up killed . sleep 1000)
  container_stop "$id" 0
  equal 137 "$(container_status "$id" exit_code)"
  id=$(container_create missing . nosuchprogram)
  refused 'executable file not found in $PATH' container_start "$id"
  equal CONTAINER_EXITED "$(container_status "$id" state)"
  equal StartError "$(container_status "$id" reason)"
  equal 128 "$(container_status "$id" exit_code)"
}

case_pod_logs() {
  local id
  pod_up
  id=$(container_up talker . sh -c 'echo to-output; echo to-errors >&2; sleep 1000')
  eventually 20 grep -q 'stdout F to-output' "$W/logs/talker.log"
  eventually 20 grep -q 'stderr F to-errors' "$W/logs/talker.log"
  mv "$W/logs/talker.log" "$W/logs/talker.log.1"
  cri ReopenContainerLog "{\"container_id\": \"$id\"}" >/dev/null
  [[ -e $W/logs/talker.log ]] || fail 'no new log'
}

case_pod_exec_sync() {
  local id
  pod_up
  id=$(container_up one . sleep 1000)
  code 5 in_container "$id" sh -c 'echo out; echo err >&2; exit 5'
  contains "$OUT" out
  contains "$OUT" err
  refused 'timed out|timeout' eval 'cri ExecSync "{\"container_id\": \"'"$id"'\", \"cmd\": [\"sleep\", \"100\"], \"timeout\": 1}" 2>&1 | sed "s/timed out\|timeout/timed out|timeout/; /timed out/q1"'
  eventually 10 eval '! in_container "'"$id"'" ps | grep -q "sleep 100$"'
}

case_pod_exec_stream() {
  local id url
  pod_up
  id=$(container_up one . sleep 1000)
  url=$(cri Exec "{\"container_id\": \"$id\", \"cmd\": [\"sh\", \"-c\", \"read x; echo got \$x; exit 6\"], \"stdin\": true, \"stdout\": true, \"stderr\": true}" | jq -r .url)
  code 6 eval "echo line | /usr/bin/python3 $INTEGRATION/cri/client.py exec $url"
  contains "$OUT" 'got line'
}

case_pod_attach() {
  local id url
  pod_up
  id=$(container_up one '.stdin = true' sh -c 'while read -r x; do echo got $x; [ $x = end ] && exit; done')
  url=$(cri Attach "{\"container_id\": \"$id\", \"stdin\": true, \"stdout\": true, \"stderr\": true}" | jq -r .url)
  contains "$(printf 'one\nend\n' | timeout 30 /usr/bin/python3 "$INTEGRATION/cri/client.py" exec "$url")" 'got end'
}

case_pod_port_forward() {
  local url id
  pod_up
  id=$(container_up web . httpd -f -h /www)
  eventually 20 in_container "$id" wget -q -O - http://127.0.0.1
  url=$(cri PortForward "{\"pod_sandbox_id\": \"$POD\", \"port\": [80]}" | jq -r .url)
  contains "$(timeout 30 /usr/bin/python3 "$INTEGRATION/cri/client.py" forward "$url" $'GET / HTTP/1.0\r\n\r\n')" 'a web page'
}

# A server that listens at the loopback interface only, in a container that joined later
# and was started again.
case_pod_port_forward_to_localhost() {
  local url id
  pod_up
  for attempt in 0 1; do
    id=$(container_up web ".metadata.attempt = $attempt" httpd -f -p 127.0.0.1:8080 -h /www)
    eventually 20 in_container "$id" wget -q -O - http://127.0.0.1:8080
    url=$(cri PortForward "{\"pod_sandbox_id\": \"$POD\", \"port\": [8080]}" | jq -r .url)
    contains "$(timeout 30 /usr/bin/python3 "$INTEGRATION/cri/client.py" forward "$url" $'GET / HTTP/1.0\r\n\r\n')" 'a web page'
    container_stop "$id" 0
    container_remove "$id"
  done
}

case_pod_host_port() {
  pod_up '.port_mappings = [{protocol: "TCP", container_port: 80, host_port: '"$((20000 + BASHPID % 10000))"', host_ip: "127.0.0.1"}]'
  container_up web . httpd -f -h /www >/dev/null
  sysctl -qw net.ipv4.conf.all.route_localnet=1
  eventually 10 output_is 'a web page' curl -sS --max-time 5 "http://127.0.0.1:$((20000 + BASHPID % 10000))"
}

case_pod_dns_and_sysctls() {
  local id seen
  pod_up '.dns_config = {servers: ["10.1.1.1"], searches: ["example.org"]} | .linux.sysctls = {"net.ipv4.ip_default_ttl": "5"}'
  id=$(container_up one . sleep 1000)
  seen=$(in_container "$id" cat /etc/resolv.conf)
  contains "$seen" 'nameserver 10.1.1.1'
  contains "$seen" 'search example.org'
  equal 5 "$(in_container "$id" cat /proc/sys/net/ipv4/ip_default_ttl)"
}

case_pod_mounts() {
  local id
  mkdir "$W/v"
  echo one >"$W/v/a"
  pod_up
  id=$(container_up one "$(jq -rn --arg v "$W/v" '".mounts = [{container_path: \"/v\", host_path: \"\($v)\"}, {container_path: \"/ro\", host_path: \"\($v)\", readonly: true}]"')" sleep 1000)
  in_container "$id" sh -c 'echo two >/v/b'
  equal two "$(cat "$W/v/b")"
  refused 'Read-only' in_container "$id" sh -c 'echo x >/ro/a'
  echo three >"$W/v/c"
  equal three "$(in_container "$id" cat /ro/c)"
}

case_pod_security_context() {
  local id
  pod_up
  id=$(container_up one '.linux.security_context += {run_as_user: {value: 1000}, run_as_group: {value: 1000}, readonly_rootfs: true,
    no_new_privs: true, supplemental_groups: [50], capabilities: {drop_capabilities: ["ALL"]}, seccomp: {profile_type: "RuntimeDefault"}}' sleep 1000)
  equal '1000 1000' "$(in_container "$id" sh -c 'echo $(id -u) $(id -g)')"
  contains "$(in_container "$id" id -G)" 50
  contains "$(in_container "$id" grep NoNewPrivs /proc/1/status)" 1
  contains "$(in_container "$id" grep CapBnd /proc/1/status)" 0000000000000000
  contains "$(in_container "$id" grep '^Seccomp:' /proc/1/status)" 2
  refused 'Read-only' in_container "$id" touch /x
}

case_pod_privileged() {
  local id
  pod_up '.linux.security_context.privileged = true'
  id=$(container_up one '.linux.security_context.privileged = true' sleep 1000)
  equal ok "$(in_container "$id" sh -c 'mount -t tmpfs t /tmp && echo ok')"
}

case_pod_stats() {
  local id seen
  pod_up
  id=$(container_up one . sh -c 'i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; sleep 1000')
  eventually 20 eval 'cri ContainerStats "{\"container_id\": \"$id\"}" | jq -e ".stats.cpu.usage_core_nano_seconds.value | tonumber > 0"'
  seen=$(cri ContainerStats "{\"container_id\": \"$id\"}")
  at_least 1 "$(jq -r '.stats.memory.working_set_bytes.value' <<<"$seen")" 'memory'
}

case_pod_memory_limit_is_exceeded() {
  local id
  pod_up
  id=$(container_up one '.linux.resources = {memory_limit_in_bytes: "33554432"}' sh -c 'tail /dev/zero; exit $?')
  eventually 60 output_is CONTAINER_EXITED container_status "$id" state
  equal 137 "$(container_status "$id" exit_code)"
  eventually 20 output_is OOMKilled container_status "$id" reason
}

case_pod_update() {
  local id
  pod_up
  id=$(container_up one '.linux.resources = {memory_limit_in_bytes: "67108864"}' sleep 1000)
  cri UpdateContainerResources "{\"container_id\": \"$id\", \"linux\": {\"memory_limit_in_bytes\": \"100663296\", \"cpu_shares\": \"512\", \"cpu_period\": \"100000\", \"cpu_quota\": \"50000\"}}"
  equal 100663296 "$(in_container "$id" sh -c "$MEMORY_LIMIT")"
}

case_pod_many_at_once() {
  local i
  for i in 1 2 3 4; do
    (
      W=$W/$i
      pod_up ".metadata.name += \"-$i\" | .metadata.uid += \"-$i\""
      id=$(container_up one . sleep 1000)
      equal "$i" "$(in_container "$id" echo "$i")"
    ) &
  done
  for i in 1 2 3 4; do wait -n || fail 'one of them failed'; done
}

case_vm_pod_host_network_is_refused() {
  refused 'network' pod_up '.linux.security_context.namespace_options.network = "NODE" | del(.hostname)'
}

case_alone_containerd_restarts() {
  local id
  pod_up
  id=$(container_up one . sh -c 'trap "exit 4" TERM; while :; do sleep 1000 & wait; done')
  catches_term in_container "$id"
  end_daemon containerd
  start_containerd
  equal CONTAINER_RUNNING "$(container_status "$id" state)"
  equal ok "$(in_container "$id" echo ok)"
  container_stop "$id" 10
  equal 4 "$(container_status "$id" exit_code)"
}
