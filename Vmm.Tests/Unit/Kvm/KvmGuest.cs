using Iced.Intel;
using Vmm.Core.Devices;
using Vmm.Core.Kvm;
using Vmm.Core.Memory;
using Vmm.Core.RunStates;
using Vmm.Devices.Vfio;
using Vmm.Tests.Support;
using Vmm.Tools.Cli.Guests;
using Vmm.Tools.Devices;

namespace Vmm.Tests.Unit.Kvm;

/// <summary>A VM with a real vCPU in this process; its serial output goes to a file.</summary>
internal sealed class KvmGuest : IDisposable
{
    internal static readonly TimeSpan Deadline = TimeSpan.FromSeconds(30);
    private readonly TempDirectory _folder = new();
    private readonly TestVm _vm;

    internal KvmGuest(byte[] image, ulong memoryBytes = 4 << 20, int cpus = 1, bool incoming = false, int dirtyRingEntries = 0, params string[] devices)
    {
        Require();
        _vm = new TestVm(new VmOptions
        {
            Memory = [new RamBlockOptions { Name = "ram", SizeBytes = memoryBytes }], Accelerator = "kvm", Cpus = cpus, IsIncoming = incoming, DirtyRingEntries = dirtyRingEntries,
            Kernel = new KernelOptions { KernelPath = "guest", Image = image }, Devices = [DeviceOptions.Parse($"serial,output={_folder["out"]}"), .. devices.Select(DeviceOptions.Parse)],
        }, static b => b.AddPlugin<KvmPlugin>().AddPlugin<SerialPlugin>().AddPlugin<EduPlugin>().AddPlugin<VfioPlugin>());
    }

    internal TestVm Test => _vm;

    internal global::Vmm.Core.Devices.Vm Vm => _vm.Vm;

    internal KvmAccelerator Kvm => (KvmAccelerator)Vm.Accelerator!;

    internal MemCheckGuest.Found Found => MemCheckGuest.Read(Vm.Memory);

    /// <summary>The guest's serial output, complete once the VM is stopped.</summary>
    internal string Output
    {
        get
        {
            using var file = new FileStream(_folder["out"], FileMode.Open, FileAccess.Read, FileShare.ReadWrite);
            return new StreamReader(file).ReadToEnd();
        }
    }

    /// <summary>Assembles a guest.</summary>
    internal static byte[] Code(Action<Assembler> write)
    {
        var a = new Assembler(64);
        write(a);
        return GuestImage.Assemble(a, GuestImage.FlatAddress);
    }

    /// <summary>A guest that walks all memory from 2 MiB on.</summary>
    internal static KvmGuest MemCheck(bool incoming = false, ulong memoryBytes = 3 << 20) =>
        new(MemCheckGuest.Build(memoryBytes), memoryBytes, incoming: incoming);

    /// <summary>Starts, waits until the guest has left the running state, and says which it entered.</summary>
    internal RunState RunToEnd()
    {
        var ended = new TaskCompletionSource<RunState>(TaskCreationOptions.RunContinuationsAsynchronously);
        Vm.RunState.Changed += (from, to) => { if (from == RunState.Running) ended.TrySetResult(to); };
        Vm.Cont();
        Assert.That(ended.Task.Wait(Deadline), "the guest did not end");
        return ended.Task.Result;
    }

    /// <summary>Polls until a condition holds, because the guest has no way to signal it.</summary>
    internal static void WaitFor(Func<bool> condition, string what)
    {
        if (!SpinWait.SpinUntil(condition, Deadline)) Assert.Fail($"not in time: {what}");
    }

    /// <summary>Ignores the test where KVM is not usable, but fails it on CI if the machine could have it.</summary>
    internal static void Require()
    {
        if (new KvmAcceleratorFactory().Probe() is not { } missing) return;
        if (!string.IsNullOrEmpty(Environment.GetEnvironmentVariable("CI")) && CouldHaveKvm()) Assert.Fail(missing.Message);
        Assert.Ignore(missing.Message);
    }

    /// <summary>A machine that is itself a virtual one may have neither the device nor a processor that could bring it; nothing can install KVM there.</summary>
    private static bool CouldHaveKvm() => File.Exists(KvmSystem.DefaultPath)
        || File.ReadLines("/proc/cpuinfo").Any(static line => line.StartsWith("flags", StringComparison.Ordinal) && line.Split(' ').Intersect(["vmx", "svm"]).Any());

    public void Dispose()
    {
        _vm.Dispose();
        _folder.Dispose();
    }
}
