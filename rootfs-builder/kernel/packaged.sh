# shellcheck shell=bash
# Recipe of the packaged flavour, sourced by build-kernel.
#
# The distribution's kernel package is downloaded and unpacked beside the
# system, never installed: no boot loader hook runs and /boot stays as it is.

: "${here:?is set by build-kernel}"
module_list=${module_list:-$here/kernel/packaged.modules}

# "PACKAGE VERSION" of the kernel that apt would install now.
packaged_kernel() {
  if [[ ${KUASAR_PACKAGED_KERNEL:-} ]]; then
    apt-cache policy "$KUASAR_PACKAGED_KERNEL" 2>/dev/null |
      awk -v name="$KUASAR_PACKAGED_KERNEL" '$1 == "Candidate:" && $2 != "(none)" { print name, $2 }'
    return
  fi
  # The meta package names the exact version it belongs to.
  apt-cache show --no-all-versions linux-image-cloud-amd64 2>/dev/null |
    sed -nE 's/^Depends:.*\<(linux-image-[^ ,]+) \(= ([^)]+)\).*/\1 \2/p'
}

recipe_inputs() {
  local kernel
  kernel=$(packaged_kernel)
  [[ $kernel ]] ||
    die "apt does not know ${KUASAR_PACKAGED_KERNEL:-linux-image-cloud-amd64}; run apt-get update"
  # This file is not the whole recipe when another one sources it.
  printf '%s\n' "package $kernel" "modules $(sha256sum <"$module_list")" \
    "recipe $(sha256sum <"${BASH_SOURCE[0]}")"
}

# A little-endian number of a file: number FILE OFFSET BYTES.
number() {
  od -A n -t "u$3" --endian=little -j "$2" -N "$3" "$1" | tr -d ' \n'
}

# extract_vmlinux BZIMAGE OUT: the kernel proper, found by the header fields of
# the boot protocol (Documentation/arch/x86/boot.rst, version 2.08 and later)
# instead of by scanning for magic numbers, which also occur inside the data.
extract_vmlinux() {
  local image=$1 out=$2 sectors start length decompress
  [[ $(dd if="$image" bs=1 skip=$((0x202)) count=4 status=none) == HdrS ]] ||
    die "$image is not a Linux boot image"
  (($(number "$image" $((0x206)) 2) >= 0x0208)) || die "$image has a boot protocol older than 2.08"
  sectors=$(number "$image" $((0x1f1)) 1)
  # payload_offset counts from the protected-mode code, behind the set-up sectors.
  start=$(((sectors + 1) * 512 + $(number "$image" $((0x248)) 4)))
  length=$(number "$image" $((0x24c)) 4)
  case $(od -A n -t x1 -j "$start" -N 6 "$image" | tr -d ' \n') in
    1f8b*) decompress='gzip -dc' ;;
    fd377a585a00) decompress='xz -dc' ;;
    28b52ffd*) decompress='zstd -dc' ;;
    02214c18*) decompress='lz4 -dc' ;;
    425a68*) decompress='bzip2 -dc' ;;
    5d0000*) decompress='xz --format=lzma -dc' ;;
    *) die "$image is compressed in an unknown way" ;;
  esac
  # The payload ends with the size of the result, four bytes that belong to no
  # compression format.
  tail -c "+$((start + 1))" "$image" | head -c "$((length - 4))" | $decompress >"$out" || [[ -s $out ]]
  local expected actual
  expected=$(number "$image" "$((start + length - 4))" 4)
  actual=$(stat -c %s "$out")
  ((expected == actual)) || die "decompressing $image gave $actual bytes instead of $expected"
  [[ $(head -c 4 "$out") == $'\x7fELF' ]] || die "$image holds no ELF kernel"
}

# Modules of one section of the list, without comments.
listed() {
  awk -v section="[$1]" '/^\[/ { on = $1 == section; next } on && NF && $1 !~ /^#/ { print $1 }' "$module_list"
}

# load_order TREE RELEASE NAME...: paths below TREE in the order in which they
# have to be loaded, each once. Names that are built in print nothing.
load_order() {
  local tree=$1 release=$2 name
  shift 2
  for name in "$@"; do
    modprobe --dirname "$tree" --set-version "$release" --config /dev/null \
      --ignore-install --show-depends "$name" ||
      die "the kernel $release has no module $name"
  done | awk '$1 == "insmod" && !seen[$2]++ { print $2 }'
}

# slim_module FILE: leaves out what a module is not needed for its work: symbols
# without a relocation, the tables of the stack unwinder, and with them the
# signature. Saves a quarter of the image and the time to check signatures,
# which prove nothing in a guest whose kernel and image come from the same hand.
slim_module() {
  strip --strip-unneeded "$1"
  objcopy -R .orc_unwind -R .orc_unwind_ip -R .rela.orc_unwind_ip -R .orc_header "$1"
}

# collect_modules TREE RELEASE OUT: OUT/boot (numbered, for the agent to load
# one after the other) and OUT/lib/modules/RELEASE (with modules.dep and
# modules.alias, to load from on demand).
collect_modules() {
  local tree=$1 release=$2 out=$3 path number=0 names
  local kept=$out/lib/modules/$release
  depmod -b "$tree" "$release"
  mkdir -p "$out/boot" "$kept"
  mapfile -t names < <(listed boot)
  load_order "$tree" "$release" "${names[@]}" >"$out/boot.order"
  while read -r path; do
    number=$((number + 1))
    install -m 0644 "$path" "$out/boot/$(printf '%02d' "$number")-${path##*/}"
  done <"$out/boot.order"
  mapfile -t names < <(listed boot; listed demand)
  load_order "$tree" "$release" "${names[@]}" >"$out/demand.order"
  while read -r path; do
    install -D -m 0644 "$path" "$kept/kernel/${path##*/kernel/}"
  done <"$out/demand.order"
  # The indices must speak of what is in the image and of nothing else.
  cp "$tree/lib/modules/$release/"modules.{order,builtin,builtin.modinfo} "$kept/"
  depmod -b "$out" "$release"
  find "$out" -name '*.ko' | while read -r path; do slim_module "$path"; done
  (cd "$out/boot" && for path in ??-*.ko; do rm -f "$(find "$kept" -name "${path#??-}")"; done)
  find "$kept" -maxdepth 1 -type f ! -name modules.dep ! -name modules.alias -delete
  rm "$out/boot.order" "$out/demand.order"
}

fetch_package() {
  local package=$1 version=$2 directory=$3
  # Sandboxing would need a directory that apt's own user may write to.
  (cd "$directory" && apt-get -q -o APT::Sandbox::User=root download "$package=$version")
}

recipe_build() {
  local work=$1 result=$2 log=$3 package version release
  # Its absence would show only as missing modules.
  command -v depmod >/dev/null || die "depmod is missing; run scripts/setup-packages packaged"
  read -r package version < <(packaged_kernel)
  if ! step "$log" "downloading $package $version" fetch_package "$package" "$version" "$work"; then
    die "$package $version could not be downloaded; apt's lists may be out of date (apt-get update)"
  fi
  step "$log" "unpacking the package" dpkg-deb -x "$work"/linux-image-*.deb "$work/tree"
  release=$(basename "$work"/tree/boot/vmlinuz-*)
  release=${release#vmlinuz-}
  step "$log" "extracting vmlinux" extract_vmlinux "$work/tree/boot/vmlinuz-$release" "$work/vmlinux"
  strip --strip-all -o "$result/vmlinux" "$work/vmlinux"
  step "$log" "collecting modules" collect_modules "$work/tree" "$release" "$result/modules"
  cp "$work/tree/boot/config-$release" "$result/config"
  printf '%s\n' "$release" >"$result/release"
}
