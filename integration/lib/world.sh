# shellcheck shell=bash
# A private place for an engine: namespaces and cgroups of its own, so that its
# daemons, bridges, firewall rules, mounts and state never touch the machine,
# and all of it ends with the script.
#
# Outside: `enter_world PROGRAM ARGUMENT...` makes the place and runs the program
# in it as process 1. Inside: `furnish_world` mounts what a fresh machine has.

readonly CGROUPS=/sys/fs/cgroup

# The directories to make cgroups in: one per hierarchy of v1, or that of v2.
cgroup_hierarchies() {
  findmnt -rn -t cgroup,cgroup2 -o TARGET | grep -E "^$CGROUPS(/|$)"
}

# only_v2: whether the machine has nothing but the one hierarchy of v2.
only_v2() {
  [[ $(findmnt -rn -t cgroup,cgroup2 -o TARGET,FSTYPE) == "$CGROUPS cgroup2" ]]
}

enter_world() {
  local directory world init status=0
  export WORLD_NAME=krt-engine-$$
  trap leave_world EXIT
  for directory in $(cgroup_hierarchies); do
    mkdir "$directory/$WORLD_NAME"
  done
  (
    for directory in $(cgroup_hierarchies); do
      # A cpuset of v1 starts empty; the root of v2 has no such files.
      if [[ -e $directory/cpuset.cpus ]]; then
        cat "$directory/cpuset.cpus" >"$directory/$WORLD_NAME/cpuset.cpus"
        cat "$directory/cpuset.mems" >"$directory/$WORLD_NAME/cpuset.mems"
      fi
      echo "$BASHPID" >"$directory/$WORLD_NAME/cgroup.procs"
    done
    # Controllers of v2 can only be handed on by a group without processes: all of
    # them, and unshare(1) as well, are in one below that of the world.
    init=''
    ! only_v2 || init=$CGROUPS/$WORLD_NAME/init
    # shellcheck disable=SC2016 # the other shell expands it
    exec unshare --cgroup sh -c '
      if [ "$1" ]; then mkdir "$1" && echo $$ >"$1/cgroup.procs"; fi
      shift
      exec unshare --mount --net --pid --ipc --uts --propagation private --fork --kill-child --mount-proc "$@"
    ' - "$init" "$@"
  ) <&0 &
  world=$!
  # unshare(1) ignores these while it waits; its end is that of the world.
  trap 'kill -KILL $world' TERM INT HUP
  wait "$world" || status=$?
  trap - TERM INT HUP
  return "$status"
}

# Everything else went with the namespaces.
leave_world() {
  local directory
  for directory in $(cgroup_hierarchies); do
    # The kernel may still be busy with the last processes.
    for _ in {1..50}; do
      find "$directory/$WORLD_NAME" -depth -type d -exec rmdir {} + 2>/dev/null
      [[ -d $directory/$WORLD_NAME ]] || break
      sleep 0.1
    done
    [[ ! -d $directory/$WORLD_NAME ]] || echo "$PROG: left behind: $directory/$WORLD_NAME" >&2
  done
}

# Mounts /sys for the world's network namespace, and in it the hierarchies with
# the world's own cgroup as their root.
mount_sys() {
  local mounts name type
  mounts=$(findmnt -rn -t cgroup,cgroup2 -o TARGET,FSTYPE)
  if only_v2; then
    mount -t sysfs sysfs /sys
    mount -t cgroup2 cgroup2 "$CGROUPS"
    sed -E 's/[a-z]+/+&/g' "$CGROUPS/cgroup.controllers" >"$CGROUPS/cgroup.subtree_control"
    return
  fi
  mount -t sysfs sysfs /sys
  mount -t tmpfs -o mode=755 cgroups "$CGROUPS"
  while read -r name type; do
    name=${name#"$CGROUPS/"}
    mkdir -p "$CGROUPS/$name"
    case $type:$name in
      cgroup2:*) mount -t cgroup2 cgroup2 "$CGROUPS/$name" ;;
      *:systemd) mount -t cgroup -o none,name=systemd cgroup "$CGROUPS/$name" ;;
      *) mount -t cgroup -o "$name" cgroup "$CGROUPS/$name" ;;
    esac
  done <<<"$mounts"
}

# Fresh directories where engines keep configuration and state. OUTPUT is a
# directory of the machine that stays visible, as $OUTPUT; so does the checkout.
furnish_world() {
  local output=$1
  exec {output_fd}<"$output" {top_fd}<"$TOP"
  mount_sys
  mount -t tmpfs -o mode=1777 tmp /tmp
  mkdir /tmp/etc /tmp/output
  cp -a /etc/. /tmp/etc
  mount --bind /tmp/etc /etc
  rm -rf /etc/containers /etc/cni /etc/docker /etc/containerd /etc/kuasar-runv
  mkdir -p /etc/containers /etc/cni/net.d /etc/docker /etc/containerd /etc/kuasar-runv
  mount -t tmpfs -o mode=755 run /run
  mkdir -p /run/lock /run/netns
  mount -t tmpfs -o mode=755 lib /var/lib
  mount -t tmpfs -o mode=1777 tmp /var/tmp
  mount --bind "/proc/self/fd/$output_fd" /tmp/output
  # It may be in one of the directories that have just been covered.
  if [[ ! -e $TOP/integration ]]; then
    mkdir -p "$TOP"
    # As it is: spelled out, the name of the descriptor is that of the new directory.
    mount --no-canonicalize --bind "/proc/self/fd/$top_fd" "$TOP"
  fi
  exec {output_fd}<&- {top_fd}<&-
  export OUTPUT=/tmp/output
  # Rootless engines need what udev makes of it: a device for everybody.
  mknod -m 666 /run/tun c 10 200
  mount --bind /run/tun /dev/net/tun
  ip link set lo up
}
