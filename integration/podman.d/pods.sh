# shellcheck shell=bash
# shellcheck disable=SC2016
# podman pod and kube play.

# pod_up [OPTION...]: a pod named $C.
pod_up() {
  p pod create --name "$C" --network none "$@" >/dev/null
}

# member NAME COMMAND...: a container of the pod that stays.
member() {
  local name=$1
  shift
  p run -d --pod "$C" --name "$C-$name" "$IMAGE" "$@" >/dev/null
}

case_pod_members_share_network_ipc_uts() {
  pod_up
  member web httpd -f -h /www
  member other sleep 1000
  eventually 10 output_is 'a web page' p exec "$C-other" wget -q -O - http://127.0.0.1
  equal "$C" "$(p exec "$C-other" hostname)"
  equal "$(p exec "$C-web" readlink /proc/self/ns/ipc)" "$(p exec "$C-other" readlink /proc/self/ns/ipc)"
}

case_pod_shares_dev_shm() {
  pod_up
  member one sleep 1000
  member two sleep 1000
  p exec "$C-one" sh -c 'echo shared >/dev/shm/x'
  equal shared "$(p exec "$C-two" cat /dev/shm/x)"
}

case_pod_shares_pids() {
  pod_up --share net,pid,ipc
  member one sleep 1234
  member two sleep 1000
  contains "$(p exec "$C-two" ps)" 'sleep 1234'
}

case_pod_does_not_share_pids() {
  pod_up
  member one sleep 1234
  member two sleep 1000
  lacks "$(p exec "$C-two" ps)" 'sleep 1234'
}

case_pod_shares_nothing() {
  p pod create --name "$C" --share '' >/dev/null
  member one sleep 1000
  p exec "$C-one" true
}

case_vm_pod_has_one_kernel() {
  pod_up
  member one sleep 1000
  member two sleep 1000
  equal "$(p exec "$C-one" cat /proc/sys/kernel/random/boot_id)" "$(p exec "$C-two" cat /proc/sys/kernel/random/boot_id)"
}

case_pod_stop_start_restart() {
  pod_up
  member one sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
  member two sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
  p pod stop -t 10 "$C"
  equal Exited "$(p pod inspect "$C" | jq -r 'if type == "array" then .[0] else . end | .State')"
  p pod start "$C"
  equal ok "$(p exec "$C-two" echo ok)"
  p pod restart "$C"
  equal ok "$(p exec "$C-one" echo ok)"
}

case_pod_member_restarts() {
  pod_up
  member one sleep 1000
  member two sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
  p restart -t 5 "$C-two"
  equal ok "$(p exec "$C-two" echo ok)"
  p rm -f -t 0 "$C-one"
  equal ok "$(p exec "$C-two" echo ok)"
}

case_pod_pause() {
  pod_up
  member one sleep 1000
  p pod pause "$C"
  equal paused "$(p inspect -f '{{.State.Status}}' "$C-one")"
  p pod unpause "$C"
  p exec "$C-one" true
}

case_pod_init_container() {
  pod_up
  mkdir "$W/v"
  p create --pod "$C" --name "$C-init" --init-ctr=once -v "$W/v:/v" "$IMAGE" sh -c 'echo made >/v/a' >/dev/null
  p create --pod "$C" --name "$C-main" -v "$W/v:/v" "$IMAGE" cat /v/a >/dev/null
  p pod start "$C"
  equal made "$(eventually 20 output_is made p logs "$C-main" && p logs "$C-main")"
}

case_pod_with_bridge_and_port() {
  p pod create --name "$C" -p 127.0.0.1::80 >/dev/null
  member web httpd -f -h /www
  eventually 20 output_is 'a web page' get "http://$(p port "$C-web" 80 2>/dev/null || p pod inspect "$C" | jq -r '.InfraConfig.PortBindings."80/tcp"[0] | .HostIp + ":" + .HostPort')"
}

case_pod_kube_play() {
  cat >"$W/pod.yaml" <<TEXT
apiVersion: v1
kind: Pod
metadata:
  name: $C
spec:
  containers:
  - name: web
    image: $IMAGE:latest
    imagePullPolicy: Never
    command: [httpd, -f, -h, /www]
    volumeMounts: [{name: data, mountPath: /data}]
  - name: other
    image: $IMAGE:latest
    imagePullPolicy: Never
    command: [sleep, "1000"]
    volumeMounts: [{name: data, mountPath: /data}]
  volumes:
  - name: data
    emptyDir: {}
TEXT
  p kube play "$W/pod.yaml" >/dev/null
  eventually 20 output_is 'a web page' p exec "$C-other" wget -q -O - http://127.0.0.1
  p exec "$C-web" sh -c 'echo x >/data/a'
  equal x "$(p exec "$C-other" cat /data/a)"
  p kube down "$W/pod.yaml"
}

case_pod_ipc_and_pid_of_another_container() {
  up --ipc shareable
  equal ok "$(run --ipc "container:$C" "$IMAGE" echo ok)"
  contains "$(run --pid "container:$C" "$IMAGE" ps)" sleep
}
