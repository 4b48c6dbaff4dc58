# shellcheck shell=bash
# What cases use to check things. A check that does not hold ends the case, and
# its text is the reason that the report shows.

# fail TEXT: ends the case.
fail() {
  printf 'why: %s\n' "$*" >&2
  exit 1
}

# short TEXT: its end, for a message.
short() {
  if ((${#1} > 400)); then echo "...${1: -400}"; else echo "$1"; fi
}

# equal WANTED SEEN [WHAT]
equal() {
  [[ $2 == "$1" ]] || fail "${3:+$3: }expected \"$1\", got \"$2\""
}

# contains TEXT PIECE [WHAT]
contains() {
  [[ $1 == *"$2"* ]] || fail "${3:+$3: }expected \"$2\" in \"$(short "$1")\""
}

# lacks TEXT PIECE [WHAT]
lacks() {
  [[ $1 != *"$2"* ]] || fail "${3:+$3: }did not expect \"$2\" in \"$(short "$1")\""
}

# at_least MINIMUM SEEN WHAT: of whole numbers.
at_least() {
  [[ $2 =~ ^[0-9]+$ ]] || fail "$3: \"$2\" is no number"
  (($2 >= $1)) || fail "$3: expected at least $1, got $2"
}

# code WANTED COMMAND...: runs COMMAND, which has to end with that exit code.
# What it wrote, to both streams, is in OUT afterwards.
code() {
  local wanted=$1 seen=0
  shift
  OUT=$("$@" 2>&1) || seen=$?
  printf '%s\n' "$OUT"
  ((seen == wanted)) || fail "\"$*\" ended with $seen instead of $wanted: $(short "$OUT")"
}

# refused PIECE COMMAND...: COMMAND has to fail with PIECE in what it says.
refused() {
  local piece=$1 seen=0
  shift
  OUT=$("$@" 2>&1) || seen=$?
  printf '%s\n' "$OUT"
  ((seen != 0)) || fail "\"$*\" should have failed"
  contains "$OUT" "$piece" "$*"
}

# eventually SECONDS COMMAND...: COMMAND has to succeed before the time is over.
eventually() {
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    ((SECONDS < end)) || fail "did not come true in time: $*"
    sleep 0.1
  done
}

# output_is WANTED COMMAND...: for eventually.
output_is() {
  local wanted=$1
  shift
  [[ $("$@" 2>&1) == "$wanted" ]]
}

# output_has PIECE COMMAND...: for eventually.
output_has() {
  local piece=$1
  shift
  [[ $("$@" 2>&1) == *"$piece"* ]]
}

# catches_term EXEC...: waits until the container's own process handles SIGTERM; until
# then it is ignored as by every first process. EXEC runs a command in the container.
catches_term() {
  eventually 20 "$@" grep -Eq '^SigCgt:.*[4-7c-f][0-9a-f]{3}$' /proc/1/status
}

# on_runc: whether the case runs with runc, where the two are meant to differ.
on_runc() {
  [[ $RUNTIME_NAME == runc ]]
}

# A script for the container: its memory limit in bytes. The hierarchy is v1 or v2,
# and with v2 the container may see all of it or its own part.
# shellcheck disable=SC2016 # expanded by the shell in the container
readonly MEMORY_LIMIT='cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null ||
  cat /sys/fs/cgroup$(sed -n s/^0:://p /proc/self/cgroup)/memory.max'
export MEMORY_LIMIT
