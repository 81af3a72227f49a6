using System.Diagnostics;
using Vmm.Core.Devices;
using Vmm.Devices.Vfio.User.Backend;
using Vmm.Devices.Vfio.User.Server;
using Vmm.Tests.Support;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Interop;

/// <summary>
/// Checks every shipped device in a Linux guest of QEMU 11.1 under TCG: enumeration, register access, INTx, MSI and MSI-X, and DMA through
/// mapped memory and through messages. The guest runs tools/qemu/guest/devices.c, which prints a line for each check.
/// </summary>
[TestFixture, Category("interop")]
internal sealed class VfioUserGuestTests
{
    private static readonly TimeSpan s_deadline = TimeSpan.FromSeconds(150);

    private static readonly string[] s_checks =
    [
        "gpio enumerated", "gpio levels", "gpio counts", "gpio upper-pins",
        "edu enumerated", "edu id", "edu inverts", "edu factorial", "edu intx", "edu intx-acknowledged", "edu intx-again", "edu msi-after-dma-read", "edu msi-after-dma-write", "edu dma",
        "dma-test enumerated", "dma-test id", "dma-test memory-bar", "dma-test msix", "dma-test msix-again", "dma-test dma", "dma-test no-error",
        "sample enumerated", "sample bar1", "sample timer-intx", "sample timer-since", "sample intx-acknowledged", "sample dma-by-descriptor", "sample dma-by-messages",
    ];

    [TestCase("memfd", true)]
    [TestCase("file", true)]
    [TestCase("none", false)]
    public void AGuestDrivesEveryDevice(string backend, bool isShared)
    {
        string qemu = QemuVersions.Binary("11.1"), kernel = QemuVersions.File("VMM_GUEST_KERNEL"), initrd = QemuVersions.File("VMM_GUEST_INITRD");
        using var folder = new TempDirectory();
        var served = new List<(string Path, IVfioUserBackend Backend, VfioUserServer Server)>();
        string console = folder["console"];
        try
        {
            foreach (string device in (string[])["gpio-pci-idio-16", "edu", "dma-test", "sample,bar1=memory"])
            {
                DeviceOptions options = DeviceOptions.Parse(device);
                IVfioUserBackend backendDevice = DeviceTypes.All.Single(t => t.TypeName == options.TypeName).Create(options);
                var server = new VfioUserServer(backendDevice);
                string path = folder[options.TypeName];
                served.Add((path, backendDevice, server));
                server.Listen(path);
            }
            string memory = backend switch
            {
                "memfd" => "-object memory-backend-memfd,id=m,size=256M,share=on -machine memory-backend=m",
                "file" => $"-object memory-backend-file,id=m,size=256M,share=on,mem-path={folder["ram"]} -machine memory-backend=m",
                _ => "",
            };
            var start = new ProcessStartInfo(qemu) { RedirectStandardError = true };
            foreach (string argument in $"-accel tcg -M q35,kernel-irqchip=split -cpu max -m 256 {memory} -nodefaults -display none -no-reboot -device intel-iommu,intremap=on,caching-mode=on -kernel {kernel} -initrd {initrd} -serial file:{console} -append".Split(' ', StringSplitOptions.RemoveEmptyEntries))
                start.ArgumentList.Add(argument);
            // no_timer_check: a busy host delivers timer ticks too late for the kernel's check, and one boot in six panicked at 40 % load.
            start.ArgumentList.Add("console=ttyS0 quiet panic=-1 intel_iommu=on no_timer_check");
            foreach ((string path, _, _) in served)
            {
                start.ArgumentList.Add("-device");
                start.ArgumentList.Add($$$"""{"driver":"vfio-user-pci","socket":{"type":"unix","path":"{{{path}}}"}}""");
            }
            using Process process = Process.Start(start)!;
            try
            {
                Task<string> errors = process.StandardError.ReadToEndAsync();
                bool ended = process.WaitForExit(s_deadline);
                if (!ended) process.Kill();
                string[] said = File.Exists(console) ? File.ReadAllLines(console) : [], lines = [.. said.Where(static l => l.StartsWith("GUEST ", StringComparison.Ordinal))];
                string all = string.Join('\n', said.TakeLast(lines.Length + 20)) + "\n" + string.Join('\n', errors.Result.Split('\n').Where(static l => !l.Contains("No such file", StringComparison.Ordinal)).TakeLast(10));
                TestContext.Out.WriteLine(string.Join('\n', lines));
                Assert.That(ended, $"the guest did not end in time: {all}");
                foreach (string check in s_checks) Assert.That(lines.Any(l => l.StartsWith($"GUEST {check} ok", StringComparison.Ordinal)), $"{check}:\n{all}");
                Assert.That(lines, Has.None.Contains("FAILED"));
                Assert.That(lines[^1], Is.EqualTo("GUEST end"));
            }
            finally
            {
                if (!process.HasExited) process.Kill();
            }
            Assert.That(((SampleDevice)served[3].Backend).Mismatches, Is.Zero);
            // With shared RAM the server maps it, so that only the sample device (index 3) sends DMA messages.
            Assert.That(served.Take(3).Sum(static s => s.Server.Stats.DmaMessages), isShared ? Is.Zero : Is.GreaterThan(20));
        }
        finally
        {
            foreach ((_, IVfioUserBackend device, VfioUserServer server) in served)
            {
                server.Dispose();
                device.Dispose();
            }
        }
    }
}
