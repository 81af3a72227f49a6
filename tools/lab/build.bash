# Sourced by tools/lab/lab: `lab_build` assembles the lab in $lab (kernel/, base.cpio, dotnet.cpio) unless it is there already.
recipe=$(cat "$here"/{build,kernel}.bash | sha256sum | cut -c 1-16)

need_host_tools() { # what builds and boots the lab; root gets it installed, others are told
  local missing=() pair
  for pair in gcc-12:gcc-12 make:make xz:xz-utils strip:binutils python3:python3 qemu-system-x86_64:qemu-system-x86; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing+=("${pair#*:}")
  done
  [ ${#missing[@]} = 0 ] && return
  [ "$(id -u)" = 0 ] || fail "missing packages: ${missing[*]} (apt-get install them, or run this once as root)"
  { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"; } >&2 || fail "cannot install ${missing[*]}"
}

pack() { # FOLDER ARCHIVE: an initramfs part; parts are concatenated, so each is padded
  ( cd "$1" && find . -mindepth 1 | LC_ALL=C sort | "$lab/kernel/bin/cpio" -o -H newc --quiet -R 0:0 ) > "$2.new" || fail "cannot pack $2"
  truncate -s %4 "$2.new"; mv "$2.new" "$2"
}

build_base() { # our own module, busybox, init
  local stamp; stamp="$recipe $(find "$here/module" "$here/guest" -type f 2>/dev/null | LC_ALL=C sort | xargs cat | sha256sum)"
  [ "$(cat "$lab/base.stamp" 2>/dev/null)" = "$stamp" ] && return
  local work=$lab/.base; rm -rf "$work"; mkdir -p "$work"/rd/{bin,dev,proc,sys,m,tmp,run} "$work/own"
  cp "$lab"/kernel/ko/*.ko "$work/rd/m/"
  cp "$lab/kernel/bin/busybox" "$work/rd/bin/"; cp "$here/guest/init" "$work/rd/init"; chmod 755 "$work/rd/init"
  if [ -e "$here/module/Kbuild" ]; then
    cp "$here"/module/* "$work/own/"; cp "$lab/kernel/Module.symvers" "$work/own/stock.symvers"
    kbuild "$lab/kernel" "$work/own"
    local module; for module in "$work"/own/*.ko; do strip -g -o "$work/rd/m/${module##*/}" "$module"; done
  fi
  pack "$work/rd" "$lab/base.cpio"
  rm -rf "$work"; echo "$stamp" > "$lab/base.stamp"
}

build_dotnet() { # the .NET runtime that runs the tests here, and the C libraries it asks for
  local root version stamp; root=$(dirname "$(readlink -f "$(command -v dotnet || fail "no dotnet")")")
  version=$(dotnet --list-runtimes | sed -nE 's/^Microsoft\.NETCore\.App (10\.[0-9.]+) .*/\1/p' | sort -V | tail -n 1)
  [ -n "$version" ] || fail "no .NET 10 runtime in $root"
  stamp="$recipe $root $version"
  [ "$(cat "$lab/dotnet.stamp" 2>/dev/null)" = "$stamp" ] && return
  local work=$lab/.dotnet; rm -rf "$work"; mkdir -p "$work/dn/host/fxr" "$work/dn/shared/Microsoft.NETCore.App"
  cp "$root/dotnet" "$work/dn/"; cp -r "$root/host/fxr/$version" "$work/dn/host/fxr/"
  cp -r "$root/shared/Microsoft.NETCore.App/$version" "$work/dn/shared/Microsoft.NETCore.App/"
  copy_libraries "$work" "$root/dotnet" "$root/shared/Microsoft.NETCore.App/$version"/lib{coreclr,clrjit,System.Native}.so
  pack "$work" "$lab/dotnet.cpio"
  rm -rf "$work"; echo "$stamp" > "$lab/dotnet.stamp"
}

copy_libraries() { # ROOT FILES...: the shared libraries of the files and the loader, at the places they have here
  local root=$1 library; shift
  ldd "$@" 2>/dev/null | grep -oE '/[^ )]+\.so[^ )]*' | sort -u | while read -r library; do
    if [ -e "$library" ]; then mkdir -p "$root$(dirname "$library")"; cp -L "$library" "$root$library"; fi
  done
}

build_peer() { # QEMU 11.1 for tests with a peer, if tools/qemu/fetch has brought it
  local root=$vmm_cache/qemu/11.1 library stamp
  [ -x "$root/qemu-system-x86_64" ] || { rm -f "$lab/peer.cpio"; return 0; }
  stamp="$recipe $(stat -c '%s %Y' "$root/usr/bin/qemu-system-x86_64")"
  [ "$(cat "$lab/peer.stamp" 2>/dev/null)" = "$stamp" ] && return
  local work=$lab/.peer peer=$lab/.peer/peer; rm -rf "$work"; mkdir -p "$peer/usr/bin" "$peer/usr/share/qemu"
  cp "$root/qemu-system-x86_64" "$peer/"; cp "$root/usr/bin/qemu-system-x86_64" "$peer/usr/bin/"
  # The wrapper's own loader lists what it would load.
  sed 's/ exec "$loader"/ exec "$loader" --list/; s/ -L .*//' "$root/qemu-system-x86_64" > "$work/list"
  sed -i "s#^here=.*#here='$root'#" "$work/list"
  sh "$work/list" | grep -oE "$root/[^ )]+" | sort -u | while read -r library; do
    mkdir -p "$peer$(dirname "${library#"$root"}")"; cp -L "$library" "$peer${library#"$root"}"
  done
  for library in usr/lib64/ld-linux-x86-64.so.2 usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2; do
    if [ -e "$root/$library" ]; then mkdir -p "$peer/${library%/*}"; cp -L "$root/$library" "$peer/$library"; fi
  done
  rm "$work/list"
  pack "$work" "$lab/peer.cpio"
  rm -rf "$work"; echo "$stamp" > "$lab/peer.stamp"
}

lab_build() {
  mkdir -p "$lab"; exec 9>"$lab/.lock"; flock 9
  need_host_tools
  build_kernel; build_base; build_dotnet; build_peer
  flock -u 9
}
