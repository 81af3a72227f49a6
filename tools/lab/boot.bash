# Sourced by tools/lab/lab: boots the lab that tools/lab/build.bash has built, and reports the results of its tests.
silence=${VMM_LAB_SILENCE:-180} # seconds without output after which the guest counts as hung
memory=${VMM_LAB_MEMORY:-1536}

lab_qemu() { # INITRD ARGS...: replaces the shell by QEMU, so that the pid of the shell is the pid of QEMU
  local initrd=$1; shift
  exec "${VMM_QEMU_LAB:-qemu-system-x86_64}" -accel tcg -M q35 -cpu max -smp 1 -m "$memory" -nodefaults -display none -no-reboot \
    -device intel-iommu,intremap=on -device edu -device e1000e -kernel "$lab/kernel/vmlinuz" -initrd "$initrd" \
    -append "console=ttyS0 quiet panic=-1 intel_iommu=on no_timer_check" "$@" # no_timer_check: that check counts ticks, which come late on a busy host
}

work='' pid=''
clean_up() { [ -z "$pid" ] || kill "$pid" 2>/dev/null || true; [ -z "$work" ] || rm -rf "$work"; }
trap clean_up EXIT; trap 'exit 130' INT TERM

lab_shell() {
  work=$(mktemp -d)
  cat "$lab"/{base,dotnet}.cpio > "$work/initrd"
  ( lab_qemu "$work/initrd" -serial mon:stdio )
}

# lab_watch LOG PID: prints the console until the guest ends. Stops a guest that prints nothing, and returns 1 then.
lab_watch() {
  local log=$1 pid=$2 seen=0 size last=${EPOCHREALTIME/[.,]/} # not SECONDS, which counts whole seconds of the clock
  while kill -0 "$pid" 2>/dev/null; do
    size=$(stat -c %s "$log")
    if [ "$size" -gt "$seen" ]; then tail -c "+$((seen + 1))" "$log" | head -c $((size - seen)) | tr -d '\r'; seen=$size last=${EPOCHREALTIME/[.,]/}; fi
    if [ $((${EPOCHREALTIME/[.,]/} - last)) -ge $((silence * 1000000)) ]; then kill "$pid"; wait "$pid" 2>/dev/null || true; return 1; fi
    sleep 0.5
  done
  tail -c "+$((seen + 1))" "$log" | tr -d '\r'
}

lab_test() { # [FILTER]
  local filter=${1:-}; work=$(mktemp -d)
  # Compile ahead of time, because JIT compilation takes seconds on the emulated CPU, also in a switchover. Fall back if the compiler's package is missing.
  local publish=(dotnet publish "$here/../../Vmm.Tests" -c Release -r linux-x64 --self-contained false -o "$work/out" -v quiet -nologo -clp:ErrorsOnly)
  "${publish[@]}" -p:PublishReadyToRun=true >&2 || "${publish[@]}" >&2 || fail "the tests do not build"
  mkdir -p "$work/app/app"
  tar -C "$work/out" --exclude='*.xml' --exclude='./runtimes' --exclude='Microsoft.VisualStudio*' --exclude='Microsoft.TestPlatform*' -c . | tar -C "$work/app/app" -x
  rm -rf "$work/out"
  mkdir -p "$work/app/guest"; cp "$lab/kernel/vmlinuz" "$work/app/guest/" # For nested guests.
  cat > "$work/app/test" <<T
#!/bin/sh
stty -F /dev/ttyS1 raw
export DOTNET_ROOT=/dn DOTNET_CLI_TELEMETRY_OPTOUT=1 DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1 DOTNET_TieredPGO=0 VMM_LAB=1
[ ! -e /peer ] || export VMM_QEMU_111=/peer/qemu-system-x86_64
cd /app && exec dotnet Vmm.Tests.dll /dev/ttyS1 '${filter//\'/}'
T
  chmod 755 "$work/app/test"
  pack "$work/app" "$work/app.cpio"; rm -rf "$work/app"
  cat "$lab"/{base,dotnet}.cpio $(ls "$lab/peer.cpio" 2>/dev/null) "$work/app.cpio" > "$work/initrd"; rm "$work/app.cpio"
  lab_run "$filter"
}

lab_run() { # [FILTER]: boots $work/initrd and prints the report
  local filter=${1:-} hung='' results=${VMM_LAB_RESULTS:-}
  : > "$work/console"; : > "$work/records"
  lab_qemu "$work/initrd" -serial "file:$work/console" -serial "file:$work/records" 2> "$work/qemu.err" & pid=$!
  lab_watch "$work/console" "$pid" || hung=1
  wait "$pid" 2>/dev/null || true; pid=
  if [ -n "$hung" ]; then
    echo "$me: the guest said nothing for $silence s and was stopped; the console's end:" >&2; tail -n 25 "$work/console" >&2
  elif ! grep -q '^LAB-RC=' "$work/console"; then
    echo "$me: the guest ended before its tests did; the console's end:" >&2; tail -n 25 "$work/console" "$work/qemu.err" >&2
  fi
  python3 "$here/report" $([ -n "$filter" ] || echo --all) "$work/records" ${results:+"$results"}
}
