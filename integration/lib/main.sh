# shellcheck shell=bash
# The driver of all engines' scripts: options, the private world, the cases.
#
# A script sets ENGINE and calls `main "$@"`. Its cases are the functions
# `case_NAME` in ENGINE.d/*.sh. The engine's own part, ENGINE.d/engine.sh, has
#   engine_start       starts daemons, loads images; runs once, in the world
#   engine_stop        ends them
#   engine_clean TAG   removes what a case may have left; TAG is in all its names
#   engine_true BINARY runs a container of `true` with that runtime, for --timed
#
# In a case: RUNTIME is the binary, RUNTIME_NAME "runc" or "kuasar-runv", C a name
# nobody else uses, W a directory for files; `fail`, `equal`, ... of check.sh.
# Functions named `case_vm_NAME` check what only a VM has and run without runc;
# `case_alone_NAME` disturb others and run by themselves, at the end.

INTEGRATION=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
TOP=$(dirname "$INTEGRATION")
readonly INTEGRATION TOP
# shellcheck source=../../scripts/lib.sh
. "$TOP/scripts/lib.sh"
# shellcheck source=check.sh
. "$INTEGRATION/lib/check.sh"
# shellcheck source=image.sh
. "$INTEGRATION/lib/image.sh"
# shellcheck source=world.sh
. "$INTEGRATION/lib/world.sh"

readonly IMAGE=localhost/busybox
readonly PAUSE_IMAGE=localhost/pause
export IMAGE PAUSE_IMAGE

usage() {
  cat <<TEXT
usage: $PROG [OPTION...] [PATTERN...]

Runs the cases of $ENGINE, or those whose name matches one of the shell patterns,
first with runc and then with \$RUNTIME (default: the kuasar-runv built here, else
the installed one), and prints one line for each:

  PASS name                 as it should be with \$RUNTIME
  FAIL name: why            not so
  RUNC-FAILS name: why      runc fails as well on this machine; not counted

  --list              print the names of the cases and end
  --representative    only the cases that continuous integration runs
  --jobs N            cases at the same time (default: one per processor)
  --limit SECONDS     for one case with one runtime (default 120)
  --output DIR        keep the cases' output there
  --no-runc           do not run the cases with runc first
  --timed             no cases: for each line "runc", "kuasar-runv" or "template" (the
                      latter in a machine of a template in \$KUASAR_RUNV_TEST_TEMPLATES) on
                      standard input run a container of \`true\` and print the seconds it took

exit code: 0 no case failed, 1 a case failed, 2 the set-up failed
Root is needed; the engines run in namespaces of their own, see lib/world.sh.
TEXT
}

parse_options() {
  patterns=() jobs=$(nproc) limit=120 output='' list='' selection=all with_runc=yes timed=''
  while (($# > 0)); do
    case $1 in
      --list) list=yes ;;
      --representative) selection=representative ;;
      --jobs) jobs=${2:?--jobs needs a number} && shift ;;
      --limit) limit=${2:?--limit needs seconds} && shift ;;
      --output) output=${2:?--output needs a directory} && shift ;;
      --no-runc) with_runc='' ;;
      --timed) timed=yes ;;
      -h | --help) usage && exit 0 ;;
      -*) usage >&2 && exit 2 ;;
      *) patterns+=("$1") ;;
    esac
    shift
  done
}

load_cases() {
  local file
  for file in "$INTEGRATION/$ENGINE.d"/*.sh; do
    # shellcheck source=/dev/null
    . "$file"
  done
}

# Prints the names of the cases that are asked for, in the order of the files.
select_cases() {
  local name pattern
  shopt -s extdebug
  for name in $(declare -F | sed -n 's/^declare -f case_//p'); do
    declare -F "case_$name"
  done | sort -k3,3 -k2,2n | while read -r name _; do
    name=${name#case_}
    if [[ $selection == representative ]] && ! grep -qx "$ENGINE $name" "$INTEGRATION/representative"; then
      continue
    fi
    ((${#patterns[@]} > 0)) || echo "$name"
    for pattern in "${patterns[@]}"; do
      # shellcheck disable=SC2053 # it is a pattern
      [[ $name != $pattern ]] || { echo "$name" && break; }
    done
  done
}

# --- outside of the world ---

find_runtime() {
  local built=$TOP/target/x86_64-unknown-linux-gnu/release/kuasar-runv
  if [[ -z ${RUNTIME:-} ]]; then
    if [[ -x $built ]]; then RUNTIME=$built; else RUNTIME=$(command -v kuasar-runv) || RUNTIME=''; fi
  fi
  [[ -x ${RUNTIME:-} ]] || die "there is no kuasar-runv: run make image, or set RUNTIME"
  RUNTIME=$(readlink -f "$RUNTIME")
  if [[ -z ${KUASAR_RUNV_CONFIG:-} && -f $TOP/target/guest/source/config.toml ]]; then
    KUASAR_RUNV_CONFIG=$TOP/target/guest/source/config.toml
  fi
  export RUNTIME KUASAR_RUNV_CONFIG=${KUASAR_RUNV_CONFIG:-}
}

run_outside() {
  local status=0 temporary=''
  ((EUID == 0)) || die "root is needed"
  "$TOP/scripts/setup-packages" run engines || return 2
  find_runtime
  if [[ -z $output ]]; then
    output=$(mktemp -d "/tmp/krt-$ENGINE-XXXXXX")
    temporary=yes
  fi
  mkdir -p "$output"
  INSIDE_OUTPUT=$(readlink -f "$output") enter_world "$BASH" "$0" "$@" || status=$?
  if [[ $temporary && $status == 0 ]]; then
    rm -rf "$output"
  else
    echo "$PROG: the output of the cases is in $output" >&2
  fi
  return "$status"
}

# --- in the world ---

configure_runtime() {
  mkdir /etc/kuasar-runv/config.d
  [[ -z $KUASAR_RUNV_CONFIG ]] || cp "$KUASAR_RUNV_CONFIG" /etc/kuasar-runv/config.toml
  local hypervisor=${KUASAR_RUNV_TEST_HYPERVISOR:-qemu} accel=${KUASAR_RUNV_TEST_ACCEL:-tcg}
  {
    printf 'hypervisor = "%s"\n[qemu]\naccel = "%s"\n' "$hypervisor" "$accel"
    # KVM that is emulated itself (scripts/l1) is no faster than emulation.
    [[ $hypervisor/$accel == qemu/tcg ]] || printf '[timeouts]\nboot_s = 120\n'
  } >/etc/kuasar-runv/config.d/test.toml
  # Engines call the runtime without the caller's environment.
  unset KUASAR_RUNV_CONFIG
  KUASAR=$RUNTIME
  RUNC=$(command -v runc)
  export KUASAR RUNC
}

# run_case NAME BINARY: in a process of its own, with a time limit. Its output goes
# to a file; prints why it failed.
run_case() {
  local name=$1 binary=$2 label log status=0
  label=kuasar-runv
  [[ $binary != "$RUNC" ]] || label=runc
  log=$OUTPUT/$name.$label.log
  RUNTIME=$binary RUNTIME_NAME=$label INSIDE_CASE=$name \
    timeout --kill-after=5 "$limit" "$BASH" "$0" >"$log" 2>&1 </dev/null || status=$?
  (engine_clean "$(tag_of "$name" "$label")") >>"$log" 2>&1 || true
  ((status != 0)) || return 0
  if ((status == 124 || status == 137)); then
    echo "not finished after $limit s"
  else
    sed -n 's/^why: //p' "$log" | head -n1 | cut -c1-300 | grep . || echo "exit code $status"
  fi
  return 1
}

# tag_of NAME LABEL: what is in all names that a case makes.
tag_of() {
  # No case's begins another's, as ctr-exec- would ctr-exec-kill-.
  local tag=${1//_/-}0
  if [[ $2 == runc ]]; then echo "${tag}r"; else echo "${tag}k"; fi
}

# The body of the process for one case.
run_inside_case() {
  set -eE
  C=$(tag_of "$INSIDE_CASE" "$RUNTIME_NAME")
  W=$(mktemp -d "/tmp/$C-XXXXXX")
  # shellcheck disable=SC2154 # status is set in the trap
  trap 'status=$?; printf "why: line %s of %s: \"%s\" ended with %s\n" "$LINENO" "${BASH_SOURCE[0]##*/}" "$BASH_COMMAND" "$status" >&2' ERR
  trap 'rm -rf "$W"' EXIT
  export C W
  # conmon leaves a file in the directory it is started in when memory was short.
  cd "$W"
  "case_$INSIDE_CASE"
}

# Runs one case with both runtimes and adds its line to the report.
judge_case() {
  local name=$1 why
  if [[ $with_runc && $name != vm_* && $name != alone_vm_* ]] && ! why=$(run_case "$name" "$RUNC"); then
    echo "RUNC-FAILS $name: $why"
  elif why=$(run_case "$name" "$KUASAR"); then
    echo "PASS $name"
  else
    echo "FAIL $name: $why"
  fi | tee -a "$OUTPUT/report"
}

run_cases() {
  local name pids=()
  for name in "$@"; do
    [[ $name == alone_* ]] && continue
    if ((${#pids[@]} >= jobs)); then
      wait -n -p ended "${pids[@]}"
      mapfile -t pids < <(printf '%s\n' "${pids[@]}" | grep -vx "$ended")
    fi
    judge_case "$name" &
    pids+=($!)
  done
  ((${#pids[@]} == 0)) || wait "${pids[@]}"
  for name in "$@"; do
    [[ $name != alone_* ]] || judge_case "$name"
  done
}

# start_daemon NAME COMMAND...: as an orphan, with its pid in /run/NAME.pid.
start_daemon() {
  local name=$1
  shift
  (
    setsid "$@" >>"$OUTPUT/$name.log" 2>&1 </dev/null &
    echo $! >"/run/$name.pid"
  )
}

# end_daemon NAME
end_daemon() {
  local pid
  pid=$(cat "/run/$1.pid")
  kill "$pid"
  for _ in {1..100}; do
    [[ -d /proc/$pid ]] || return 0
    sleep 0.1
  done
  kill -9 "$pid"
}

# What the runtime keeps must be gone with the containers.
judge_leaks() {
  local left
  for _ in {1..100}; do
    left=$(pgrep -af 'kuasar-runv (sandboxer|standin)|qemu-system' || true
      find /run/kuasar-runv -mindepth 2 -maxdepth 2 -path '*/containers/*' -o -mindepth 2 -maxdepth 2 -path '*/sandboxes/*' 2>/dev/null)
    [[ $left ]] || break
    sleep 0.1
  done
  if [[ $left ]]; then echo "FAIL nothing_is_left: ${left//$'\n'/, }"; else echo 'PASS nothing_is_left'; fi |
    cut -c1-400 | tee -a "$OUTPUT/report"
}

# Answers the requests of bench/src/engines.rs.
serve_timed() {
  local name begin end templates=/etc/kuasar-runv/config.d/templates.toml
  while read -r name; do
    rm -f "$templates"
    case $name in
      runc) name=$RUNC ;;
      template)
        name=$KUASAR
        printf '[template]\nenabled = true\ndir = "%s"\n' "${KUASAR_RUNV_TEST_TEMPLATES:?}" >"$templates"
        ;;
      *) name=$KUASAR ;;
    esac
    begin=$EPOCHREALTIME
    engine_true "$name" >>"$OUTPUT/engine.log" 2>&1 </dev/null || die "the container failed, see $OUTPUT/engine.log"
    end=$EPOCHREALTIME
    awk -v begin="$begin" -v end="$end" 'BEGIN { printf "%.6f\n", end - begin }'
  done
}

run_inside() {
  local cases passed failed excused
  furnish_world "$INSIDE_OUTPUT"
  configure_runtime
  mapfile -t cases < <(select_cases)
  [[ $timed ]] || ((${#cases[@]} > 0)) || die "there are no cases to run"
  : >"$OUTPUT/report"
  engine_start >"$OUTPUT/engine.log" 2>&1 || {
    tail -n 20 "$OUTPUT/engine.log" >&2
    die "$ENGINE could not be started"
  }
  if [[ $timed ]]; then
    serve_timed
    engine_stop >>"$OUTPUT/engine.log" 2>&1
    return
  fi
  run_cases "${cases[@]}"
  engine_stop >>"$OUTPUT/engine.log" 2>&1 || true
  judge_leaks
  passed=$(grep -c '^PASS' "$OUTPUT/report" || true)
  failed=$(grep -c '^FAIL' "$OUTPUT/report" || true)
  excused=$(grep -c '^RUNC-FAILS' "$OUTPUT/report" || true)
  echo "$ENGINE with ${KUASAR##*/}: $passed passed, $failed failed, $excused fail with runc as well; $SECONDS s"
  ((failed == 0))
}

main() {
  PROG=$ENGINE
  parse_options "$@"
  load_cases
  if [[ ${INSIDE_CASE:-} ]]; then
    run_inside_case
  elif [[ ${INSIDE_OUTPUT:-} ]]; then
    run_inside || exit 1
  elif [[ $list ]]; then
    select_cases
  else
    [[ -n $(select_cases) ]] || die "no case matches"
    run_outside "$@" || exit
  fi
}
