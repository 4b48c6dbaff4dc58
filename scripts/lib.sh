# shellcheck shell=bash
# Shared by the scripts of this project; to be sourced by bash.
#
# Progress goes to standard error, one line per step with the seconds it took;
# the output of a step goes to a log that is shown only when the step fails.

# say TEXT: one progress line.
say() {
  printf '%-14s %4ds  %s\n' "${PROG:-${0##*/}}" "$SECONDS" "$*" >&2
}

# die TEXT: report and give up.
die() {
  printf '%s: error: %s\n' "${PROG:-${0##*/}}" "$*" >&2
  exit 1
}

# step LOG TEXT COMMAND...: runs COMMAND with its output appended to LOG.
step() {
  local log=$1 text=$2 begin=$SECONDS status=0
  shift 2
  say "$text ..."
  "$@" >>"$log" 2>&1 || status=$?
  if ((status != 0)); then
    printf '%s: error: "%s" failed with status %d; the end of its output:\n' \
      "${PROG:-${0##*/}}" "$text" "$status" >&2
    tail -n 40 "$log" >&2 || true
    return "$status"
  fi
  say "$text: done in $((SECONDS - begin)) s"
}

# cache_dir: where results are kept that outlive a checkout.
cache_dir() {
  printf '%s' "${KUASAR_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:?HOME is not set}/.cache}/kuasar-runv}"
}

# lock_file FILE SECONDS: takes an exclusive lock that ends with this process.
# Children keep it alive as well, so that an orphaned compiler still counts.
lock_file() {
  local fd
  exec {fd}>"$1"
  if ! flock -n "$fd"; then
    say "waiting for another build that holds $1"
    flock -w "$2" "$fd" || die "gave up after $2 s waiting for the lock $1"
  fi
}

# install_file SOURCE TARGET [MODE]: replaces TARGET in one step, and only when it differs.
install_file() {
  if cmp -s "$1" "$2"; then
    return 0
  fi
  local temporary
  temporary=$(mktemp "$2.XXXXXX")
  cp --reflink=auto "$1" "$temporary"
  chmod "${3:-0644}" "$temporary"
  mv -f "$temporary" "$2"
}
