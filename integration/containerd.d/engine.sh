# shellcheck shell=bash
# containerd in the world: configuration, daemon, images, clean-up.

readonly CTR_NAMESPACE=cases
export CRI_SOCKET=/run/containerd/containerd.sock CRI_MODULES=/tmp/cri

# c ARGUMENT...: ctr in the namespace of the cases.
c() {
  ctr -n "$CTR_NAMESPACE" "$@"
}

# ctr_run [OPTION...] IMAGE ID COMMAND...: ctr run with the runtime of the case.
ctr_run() {
  c run --runc-binary "$RUNTIME" "$@"
}

# ctr_up [OPTION...]: starts a container named $C that waits.
ctr_up() {
  ctr_run -d "$@" "$IMAGE:latest" "$C" sh -c 'trap "exit 0" TERM; while :; do sleep 1000 & wait; done'
}

# cri METHOD JSON: one call; prints the answer.
cri() {
  /usr/bin/python3 "$INTEGRATION/cri/client.py" call "$1" "$2"
}

write_containerd_config() {
  cat >/etc/containerd/config.toml <<TEXT
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "$CRI_SOCKET"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "$PAUSE_IMAGE:latest"
  # For machines without CAP_SYS_RESOURCE.
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd]
  default_runtime_name = "runc"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
TEXT
  # The snippet that is shipped, for the binary under test.
  sed "s|@BIN@/kuasar-runv|$KUASAR|" "$TOP/etc/engines/containerd.toml" >>/etc/containerd/config.toml
  cat >/etc/cni/net.d/10-cases.conflist <<'TEXT'
{"cniVersion": "0.4.0", "name": "cases", "plugins": [
  {"type": "bridge", "bridge": "cni-cases", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.66.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
TEXT
}

start_containerd() {
  start_daemon containerd containerd --config /etc/containerd/config.toml
  eventually 30 cri Status '{}'
}

engine_start() {
  mkdir -p "$CRI_MODULES"
  protoc --python_out="$CRI_MODULES" -I "$INTEGRATION/cri" "$INTEGRATION/cri/runtime.proto"
  write_containerd_config
  make_busybox_image /tmp/busybox.tar
  make_pause_image /tmp/pause.tar
  start_containerd
  c images import /tmp/busybox.tar
  ctr -n k8s.io images import /tmp/busybox.tar
  ctr -n k8s.io images import /tmp/pause.tar
}

engine_stop() {
  end_daemon containerd
}

# remove_tasks TAG: what `ctr` made.
remove_tasks() {
  local name
  for name in $(c tasks ls -q | grep "^$1"); do
    c tasks rm -f "$name"
  done
  for name in $(c containers ls -q | grep "^$1"); do
    c containers rm "$name"
  done
}

engine_clean() {
  local pod
  remove_tasks "$1"
  for pod in $(cri ListPodSandbox "$(jq -n --arg case "$1" '{filter: {label_selector: {case: $case}}}')" |
    jq -r '.items[].id'); do
    cri StopPodSandbox "{\"pod_sandbox_id\": \"$pod\"}"
    cri RemovePodSandbox "{\"pod_sandbox_id\": \"$pod\"}"
  done
}

engine_true() {
  c run --rm --runc-binary "$1" "$IMAGE:latest" timed true
}
