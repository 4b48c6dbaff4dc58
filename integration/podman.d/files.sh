# shellcheck shell=bash
# shellcheck disable=SC2016
# Files: cp, diff, commit, export, volumes, tmpfs, secrets.

case_files_copy_into_and_out_of_running() {
  local host
  up
  host=$(sha256sum /etc/passwd)
  echo content >"$W/file"
  p cp "$W/file" "$C:/etc/passwd"
  equal content "$(p exec "$C" cat /etc/passwd)"
  equal "$host" "$(sha256sum /etc/passwd)" "the host's /etc/passwd"
  p cp "$C:/www" "$W/www"
  equal 'a web page' "$(cat "$W/www/index.html")"
}

case_files_copy_into_stopped() {
  p create --name "$C" --network none "$IMAGE" cat /copied
  echo content >"$W/file"
  p cp "$W/file" "$C:/copied"
  equal content "$(p start -a "$C")"
  p cp "$C:/copied" "$W/back"
  equal content "$(cat "$W/back")"
}

case_files_copy_follows_no_link_to_the_host() {
  up
  p exec "$C" sh -c "ln -s $W/target /link; mkdir -p /data"
  echo secret >"$W/target"
  p cp "$C:/link" "$W/out" 2>/dev/null || true
  [[ ! -f $W/out ]] || lacks "$(cat "$W/out")" secret
}

case_files_copy_to_volume_and_tmpfs() {
  mkdir "$W/v"
  up -v "$W/v:/v" --tmpfs /t
  echo content >"$W/file"
  p cp "$W/file" "$C:/v/file"
  equal content "$(cat "$W/v/file")"
  equal content "$(p exec "$C" cat /v/file)"
}

case_files_diff_commit_export() {
  up
  p exec "$C" sh -c 'echo new >/new'
  contains "$(p diff "$C")" 'A /new'
  p commit -q "$C" "localhost/$C-image"
  equal new "$(run "localhost/$C-image" cat /new)"
  p export "$C" | tar -xO new >"$W/new"
  equal new "$(cat "$W/new")"
}

case_files_mount() {
  local place
  up
  place=$(p mount "$C")
  echo from-the-host >"$place/hello"
  equal from-the-host "$(p exec "$C" cat /hello)"
  p umount "$C"
}

case_files_volume_is_live() {
  mkdir "$W/v"
  up -v "$W/v:/v"
  echo one >"$W/v/a"
  equal one "$(p exec "$C" cat /v/a)"
  p exec "$C" sh -c 'echo two >/v/b; mv /v/a /v/c'
  equal two "$(cat "$W/v/b")"
  equal one "$(cat "$W/v/c")"
}

case_files_volume_read_only() {
  mkdir "$W/v"
  echo one >"$W/v/a"
  code 1 run -v "$W/v:/v:ro" "$IMAGE" sh -c 'cat /v/a && echo x >/v/a'
  contains "$OUT" 'Read-only file system'
  equal one "$(cat "$W/v/a")"
}

case_files_volume_of_one_file() {
  echo one >"$W/a"
  equal one "$(run -v "$W/a:/etc/a" "$IMAGE" cat /etc/a)"
  run -v "$W/a:/etc/a" "$IMAGE" sh -c 'echo two >/etc/a'
  equal two "$(cat "$W/a")"
}

case_files_named_volume() {
  p volume create "$C"
  run -v "$C:/v" "$IMAGE" sh -c 'echo kept >/v/a'
  equal kept "$(run -v "$C:/v" "$IMAGE" cat /v/a)"
}

case_files_anonymous_volume_has_the_image_files() {
  equal 'a web page' "$(run -v /www "$IMAGE" cat /www/index.html)"
}

case_files_tmpfs() {
  local seen
  seen=$(run --tmpfs /t:size=4m,mode=700,noexec "$IMAGE" sh -c 'grep " /t " /proc/mounts; stat -c %a /t')
  contains "$seen" 'tmpfs'
  contains "$seen" 'size=4096k'
  contains "$seen" 'noexec'
  contains "$seen" '700'
}

case_files_secret() {
  printf 'hush' | p secret create "$C" - >/dev/null
  equal 'hush' "$(run --secret "$C" "$IMAGE" cat "/run/secrets/$C")"
  equal 'hush' "$(run --secret "$C,type=env,target=S" "$IMAGE" sh -c 'echo $S')"
}

case_files_volume_propagation() {
  mkdir -p "$W/v/sub" "$W/other"
  mount --bind "$W/v" "$W/v"
  mount --make-shared "$W/v"
  echo inner >"$W/other/a"
  up -v "$W/v:/v:rslave"
  mount --bind "$W/other" "$W/v/sub"
  equal inner "$(p exec "$C" cat /v/sub/a)"
  p rm -f -t 0 "$C"
  umount "$W/v/sub" "$W/v"
}

case_files_volumes_from() {
  p create --name "$C" --network none -v "$C:/v" "$IMAGE" true
  run --volumes-from "$C" "$IMAGE" sh -c 'echo x >/v/a'
  equal x "$(run --volumes-from "$C" "$IMAGE" cat /v/a)"
}

case_files_image_volume() {
  equal 'a web page' "$(run --mount "type=image,source=$IMAGE,destination=/i" "$IMAGE" cat /i/www/index.html)"
}

case_files_overlay_volume() {
  mkdir "$W/v"
  echo one >"$W/v/a"
  equal two "$(run -v "$W/v:/v:O" "$IMAGE" sh -c 'echo two >/v/a; cat /v/a')"
  equal one "$(cat "$W/v/a")"
}
