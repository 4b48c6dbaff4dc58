# shellcheck shell=bash
# Recipe of the source flavour, sourced by build-kernel.
#
# linux-source of the distribution + patches/ -> tinyconfig + guest.config -> vmlinux.

: "${here:?is set by build-kernel}"
fragment=$here/kernel/guest.config
headers=$here/kernel/common.h
compiler=$here/kernel/cc
patches=("$here"/kernel/patches/*.patch)

# The newest installed linux-source-X.Y package.
source_package() {
  dpkg-query -W -f '${db:Status-Abbrev} ${Package} ${Version}\n' 'linux-source-*' 2>/dev/null |
    awk '$1 == "ii" && $2 ~ /^linux-source-[0-9]+\.[0-9]+$/ { print $2, $3 }' | sort -V | tail -n 1
}

recipe_inputs() {
  local package
  package=$(source_package)
  [[ $package ]] || die "no linux-source package is installed; run scripts/setup-packages kernel"
  printf '%s\n' "source $package" "compiler $(gcc --version | head -n 1)" \
    "linker $(ld --version | head -n 1)" "files $(cat "$fragment" "$headers" "$compiler" "${patches[@]}" | sha256sum)"
}

# Whole subsystems of hardware drivers are left in the archive: the build only
# reads their Kconfig files. Halves the time and the space of unpacking.
source_excludes=(
  '*/Documentation/*/*' '*/tools/testing/*' '*/tools/perf/*' '*/sound/*.[ch]'
  '*/drivers/gpu/*.[ch]' '*/drivers/media/*.[ch]' '*/drivers/infiniband/*.[ch]'
  '*/drivers/net/ethernet/*.[ch]' '*/drivers/net/wireless/*.[ch]'
  '*/drivers/scsi/*.[ch]' '*/drivers/usb/*.[ch]' '*/drivers/staging/*.[ch]'
  '*.dts' '*.dtsi'
)

unpack_source() {
  local archive=$1 tree=$2 pattern arguments=()
  for pattern in "${source_excludes[@]}"; do
    arguments+=("--exclude=$pattern")
  done
  mkdir -p "$tree"
  tar -C "$tree" --strip-components=1 "${arguments[@]}" -xf "$archive"
}

# apply_patches TREE: a patch that a new source does not take any more is left out:
# a kernel without it works, and the tests name what it lacks.
apply_patches() {
  local tree=$1 file
  for file in "${patches[@]}"; do
    if patch -d "$tree" -p1 --dry-run --quiet --force <"$file"; then
      patch -d "$tree" -p1 --no-backup-if-mismatch --force <"$file"
    else
      say "${file##*/} does not apply to this source and is left out"
    fi
  done
}

# effective_fragment VERSION: guest.config without comments and without the
# options that "# since X.Y" says a source of VERSION does not know.
effective_fragment() {
  awk -v have="$1" '
    function number(v, part) { split(v, part, "."); return part[1] * 1000 + part[2] }
    /^CONFIG_/ {
      if (match($0, /# since [0-9.]+/) && number(substr($0, RSTART + 8, RLENGTH - 8)) > number(have)) next
      sub(/[ \t]+#.*/, ""); print
    }' "$fragment"
}

# check_config FRAGMENT CONFIG: prints each option that did not end up as requested.
check_config() {
  awk -F= '
    NR == FNR { if (/^CONFIG_/) have[$1] = substr($0, length($1) + 2); next }
    { want = substr($0, length($1) + 2); is = ($1 in have) ? have[$1] : "n" }
    want != is { printf "  %s: wanted %s, is %s\n", $1, want, is }' "$2" "$1"
}

configure() {
  local tree=$1 version missing
  version=$(make -s -C "$tree" kernelversion)
  effective_fragment "$version" >"$tree/guest.config"
  make -C "$tree" tinyconfig
  (cd "$tree" && scripts/kconfig/merge_config.sh -m -Q .config guest.config)
  make -C "$tree" olddefconfig
  missing=$(check_config "$tree/guest.config" "$tree/.config")
  if [[ $missing ]]; then
    printf 'options of %s that the kernel %s does not accept as written:\n%s\n' \
      "$fragment" "$version" "$missing"
    return 1
  fi
}

# What only costs compile time: warnings about a released source, and keeping
# track of the macros that they would name. Neither changes the code.
compiler_flags='-w -ftrack-macro-expansion=0'

# kernel_make TREE ARGUMENT...
kernel_make() {
  local tree=$1
  shift
  nice -n 5 make -C "$tree" "-j${KUASAR_JOBS:-$(nproc)}" CC="$compiler" KCFLAGS="$compiler_flags" "$@"
}

# prepare_headers TREE: sets up the cc wrapper. Its options are those with which
# the kernel's makefiles compile a plain file.
prepare_headers() {
  local tree=$1 command word after='' options=() included=() compared=()
  kernel_make "$tree" lib/bcd.o
  command=$(sed -n 's/^savedcmd_[^=]*:= [^ ]* *//p' "$tree/lib/.bcd.o.cmd")
  for word in ${command%% ; *}; do
    case $word in
      -Wp,-MMD,* | -DKBUILD_* | -D__KBUILD_* | -c | -o | lib/bcd.*) ;;
      *) options+=("$word") ;;
    esac
  done
  mkdir -p "$KUASAR_PCH"
  for word in "${options[@]}"; do
    case $after$word in
      -include) after=-include/ ;;
      -include/*) included+=("$word") && after='' ;;
      -I* | -D*) ;;
      *) compared+=("$word") ;;
    esac
  done
  # Found when gcc refuses the precompiled copy, and then harmless.
  printf '#include "%s"\n' "${included[@]}" >"$KUASAR_PCH/common.h"
  (cd "$tree" && gcc "${options[@]}" -x c-header "$headers" -o "$KUASAR_PCH/common.h.gch")
  printf '%s' "${included[*]} ${compared[*]}" >"$KUASAR_PCH/options"
}

# compile TREE LOG: like step, with a line every 15 seconds.
compile() {
  local tree=$1 log=$2 begin=$SECONDS pid
  kernel_make "$tree" vmlinux >>"$log" 2>&1 &
  pid=$!
  while sleep 1 && kill -0 "$pid" 2>/dev/null; do
    if (((SECONDS - begin) % 15 == 0)); then
      say "compiling: $(grep -c '^  CC ' "$log" || true) files"
    fi
  done
  wait "$pid" || {
    grep -E -B 2 -A 12 'error:|Error [0-9]|undefined reference' "$log" | tail -n 60 >&2
    die "the kernel did not compile; the whole output is in $log"
  }
  # The second line is the time of the children; a pipe would show that of a subshell.
  times >"$tree/times"
  say "$(wc -l <"$KUASAR_PCH/used") of $(grep -c '^  CC ' "$log") files took the precompiled header"
  say "compiling: done in $((SECONDS - begin)) s; user and system time so far: $(tail -n 1 "$tree/times")"
}

recipe_build() {
  local work=$1 result=$2 log=$3 package version tree=$1/tree
  read -r package version < <(source_package)
  say "building from $package $version (log: $log)"
  # Nothing of the building machine ends up in the kernel.
  export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=kuasar KBUILD_BUILD_HOST=kuasar \
    KBUILD_BUILD_VERSION=1
  unset MAKEFLAGS MFLAGS MAKELEVEL
  step "$log" "unpacking the source" unpack_source "/usr/src/$package.tar.xz" "$tree"
  apply_patches "$tree" >>"$log" || die "patching failed, see $log"
  step "$log" "configuring" configure "$tree"
  export KUASAR_PCH=$work/headers
  step "$log" "preparing" prepare_headers "$tree"
  compile "$tree" "$log"
  strip --strip-all -o "$result/vmlinux" "$tree/vmlinux"
  cp "$tree/.config" "$result/config"
  # The kernel carries no symbol names; with these the addresses of a crash can be read.
  cp "$tree/System.map" "$result/System.map"
  make -s -C "$tree" kernelrelease >"$result/release.new"
  mv "$result/release.new" "$result/release"
}
