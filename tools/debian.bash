# Sourced by scripts that fetch Debian packages into the cache folder. It installs nothing: a private APT configuration finds the packages on the
# mirror of this machine, and dpkg-deb unpacks them. APT chooses the versions. The sourcing script must set `me` to its name.
vmm_cache="${VMM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/vmm}"
fail() { echo "$me: $*" >&2; exit 1; }
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$keyring" ] || fail "missing $keyring (package debian-archive-keyring)"
mirror=$(sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb (\[[^]]*\] )?(http[^ ]+).*/\2/p' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null \
  | grep -E '/debian/?$' | head -n 1 || true)
[ -n "$mirror" ] || fail "no Debian mirror found in the APT sources"

# apt_in DIR TOOL ARGS...: runs an APT tool with the sources, state and cache in DIR.
apt_in() {
  local dir=$1; shift; local tool=$1; shift
  "$tool" -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::Etc::preferencesparts=/dev/null -o Dir::State="$dir/state" \
    -o Dir::State::status="$dir/status" -o Dir::Cache="$dir/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1 \
    -o APT::Get::List-Cleanup=0 -o Acquire::Languages=none -o APT::Install-Recommends=0 "$@"
}
new_root() { # DIR: makes an APT root in DIR; its source lines come on stdin
  mkdir -p "$1/state/lists/partial" "$1/cache/archives/partial"; : > "$1/status"; cat > "$1/sources.list"
}
binary_root() { # DIR SUITE...: makes an APT root for binary packages of the suites, and reads the package lists
  local dir=$1; shift
  local suite; for suite in "$@"; do echo "deb [signed-by=$keyring] $mirror $suite main"; done | new_root "$dir"
  apt_in "$dir" apt-get -qq update >&2 || fail "cannot read the package lists of $*"
}
