# Sourced by tools/lab/lab: `build_kernel` brings the lab's kernel, its modules, busybox and cpio into $lab/kernel. The only part that needs a network.
# Kernel and headers come from Debian's 6.12 meta package, whatever version it names today. Debian builds no mdev, iommufd, VFIO cdev or mtty:
# they are built from the matching source package as modules for the stock kernel (in-tree sources with the switches on).
suite=bookworm-security meta=linux-image-6.12-cloud-amd64 source_package=linux-source-6.12
kernel_recipe=$(sha256sum < "$here/kernel.bash" | cut -c 1-16)

security_mirror() {
  sed -nE 's/^URIs: *([^ ]+).*/\1/p; s/^deb (\[[^]]*\] )?(http[^ ]+).*/\2/p' /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list /etc/apt/sources.list 2>/dev/null \
    | grep -E '/debian-security/?$' | head -n 1 || true
}

fetch_kernel() { # WORK: downloads and unpacks image, headers, sources and the few programs that hosts lack
  local work=$1 security release base version
  security=$(security_mirror); [ -n "$security" ] || fail "no debian-security mirror in the APT sources"
  printf 'deb [signed-by=%s] %s\n' "$keyring" "$security $suite main" "$keyring" "$mirror bookworm main" | new_root "$work/apt"
  apt_in "$work/apt" apt-get -qq update >&2 || fail "cannot read the package lists of $suite"
  release=$(apt_in "$work/apt" apt-cache depends "$meta" 2>/dev/null | sed -n 's/^ *Depends: linux-image-//p')
  [ -n "$release" ] || fail "$suite has no $meta any more: choose another suite and kernel in tools/lab/kernel.bash"
  base=${release%-cloud-amd64}
  version=$(apt_in "$work/apt" apt-cache policy "linux-image-$release" | sed -n 's/^ *Candidate: //p')
  mkdir -p "$work/deb" "$work/k"
  ( cd "$work/deb" && apt_in "$work/apt" apt-get -qq download "linux-image-$release" "linux-headers-$release" "linux-headers-$base-common" \
      "linux-kbuild-${base}" "$source_package=$version" busybox-static cpio libelf1 >&2 ) || fail "cannot download kernel $release from $suite"
  local deb; for deb in "$work"/deb/*.deb; do dpkg-deb -x "$deb" "$work/k"; rm "$deb"; done
  echo "$release" > "$work/release"
  tar -xJf "$work/k/usr/src/$source_package.tar.xz" -C "$work/k" --strip-components=1 "$source_package"/{samples/vfio-mdev,drivers/vfio,drivers/iommu/iommufd,drivers/iommu/iommu-priv.h,lib/interval_tree.c} \
    || fail "$source_package has moved the sources of vfio, iommufd or mtty"
}

build_stock() { # WORK: mdev, mtty, iommufd and vfio with cdev, as modules, in $work/m
  local k=$1/k m=$1/m
  mkdir -p "$m/iommu"
  cp -r "$k/drivers/iommu/iommufd" "$k/drivers/iommu/iommu-priv.h" "$m/iommu/"; cp -r "$k/drivers/vfio" "$m/"; cp "$k/samples/vfio-mdev/mtty.c" "$m/vfio/mdev/"
  { printf '#include <linux/%s.h>\n' interval_tree interval_tree_generic export
    awk '/CONFIG_INTERVAL_TREE_SPAN_ITER/{p=1;next} /^#endif/{p=0} p' "$k/lib/interval_tree.c"; } > "$m/iommu/iommufd/span_iter.c"
  find "$m" -name Makefile -delete
  cat > "$m/Kbuild" <<'K'
subdir-ccflags-y := -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_IOMMUFD_DRIVER=1 -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1
obj-m += iommu/iommufd/ vfio/
K
  printf '%s\n' 'iommufd-y := device.o fault.o hw_pagetable.o io_pagetable.o ioas.o main.o pages.o vfio_compat.o span_iter.o iova_bitmap.o' \
    'obj-m += iommufd.o' > "$m/iommu/iommufd/Kbuild"
  printf '%s\n' 'vfio-y := vfio_main.o group.o iommufd.o device_cdev.o container.o virqfd.o' 'obj-m += vfio.o vfio_iommu_type1.o pci/ mdev/' > "$m/vfio/Kbuild"
  printf '%s\n' 'vfio-pci-core-y := vfio_pci_core.o vfio_pci_intrs.o vfio_pci_rdwr.o vfio_pci_config.o' 'vfio-pci-y := vfio_pci.o vfio_pci_igd.o' \
    'obj-m += vfio-pci-core.o vfio-pci.o' > "$m/vfio/pci/Kbuild"
  printf '%s\n' 'mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o' 'obj-m += mdev.o mtty.o' > "$m/vfio/mdev/Kbuild"
  kbuild "$1" "$m"
}

kbuild() { # TREE FOLDER: the modules of FOLDER against the headers in TREE
  local headers; headers=$1/k/usr/src/linux-headers-$(cat "$1/release")
  # The headers' Makefiles name /usr/src and the compiler's package; BTF would need pahole; objtool needs libelf.
  LD_LIBRARY_PATH="$1/k/usr/lib/x86_64-linux-gnu" make -s -j"$(nproc)" -C "$headers" M="$2" CONFIG_DEBUG_INFO_BTF_MODULES= modules >"$2.log" 2>&1 \
    || { tail -n 30 "$2.log" >&2; fail "the modules in $2 do not build"; }
}

build_kernel() { # the part that needs the network: $lab/kernel
  [ "$(cat "$lab/kernel/.complete" 2>/dev/null)" = "$kernel_recipe" ] && return
  local work release; work=$lab/.kernel; rm -rf "$work"; mkdir -p "$work"
  fetch_kernel "$work"; release=$(cat "$work/release")
  sed -i "s#/usr/src/#$lab/kernel/k/usr/src/#g" "$work/k/usr/src/linux-headers-$release/Makefile"
  rm -rf "$lab/kernel"; mv "$work" "$lab/kernel"; work=$lab/kernel # the headers name their final place
  build_stock "$work"
  mkdir "$work/ko"
  local module; for module in iommu/iommufd/iommufd vfio/vfio vfio/vfio_iommu_type1 vfio/pci/vfio-pci-core vfio/pci/vfio-pci vfio/mdev/mdev vfio/mdev/mtty; do
    strip -g -o "$work/ko/${module##*/}.ko" "$work/m/$module.ko"
  done
  for module in virt/lib/irqbypass arch/x86/kvm/kvm arch/x86/kvm/kvm-amd; do
    xz -dc "$work/k/lib/modules/$release/kernel/$module.ko.xz" > "$work/ko/${module##*/}.ko" || fail "kernel $release has no module $module"
  done
  cp "$work/k/boot/vmlinuz-$release" "$work/vmlinuz"
  cp "$work/m/Module.symvers" "$work/"
  mkdir "$work/bin"; cp "$work/k/bin/busybox" "$work/bin/busybox"; cp "$work/k/bin/cpio" "$work/bin/cpio"
  # What is left is what building the project's own module needs.
  rm -rf "$work"/{apt,deb,m,m.log} "$work"/k/{boot,bin,drivers,samples,lib/modules,usr/share,usr/src/linux-source*}
  echo "$kernel_recipe" > "$work/.complete"
}
