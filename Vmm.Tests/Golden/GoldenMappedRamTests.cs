using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Core.SaveVm;
using Vmm.Migration.Channels;
using Vmm.Migration.Status;
using Vmm.Tests.Support;

namespace Vmm.Tests.GoldenTests;

/// <summary>Mapped-ram files of QEMU load, and vmm writes the same content to the same bytes (stream 5).</summary>
[TestFixture, Parallelizable(ParallelScope.All)]
public sealed class GoldenMappedRamTests
{
    private const long Offset = 0x3000;
    private const string Plain = "none-111-mapped-ram.bin", AtOffset = "none-111-mapped-ram-offset.bin", NoDetection = "none-111-mapped-ram-zpnone.bin", Ignored = "none-111-mapped-ram-ignore-shared.bin";

    [TestCase(Plain)]
    [TestCase(AtOffset)]
    [TestCase(NoDetection)]
    [TestCase("none-111-mapped-ram-multifd-directio.bin")]
    public async Task QemusFileLoads(string name)
    {
        using TestVm vm = Machine(incoming: true);
        var file = new MemoryFile(Golden.Read(name)) { Position = name == AtOffset ? Offset : 0 };
        Assert.That(await vm.Engine.MigrateIncoming(file), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        Assert.That(vm.Ram.ReadOnlySlice(0, 1 << 20).SequenceEqual(Golden.RamA()), "RAM differs from RAM_A");
        Assert.That(file.Position, Is.EqualTo(file.LengthBytes));
    }

    [TestCase(Plain)]
    [TestCase(AtOffset)]
    [TestCase(NoDetection)]
    [TestCase(Ignored)]
    public async Task WhatWeSaveEqualsQemu(string name)
    {
        using var folder = new TempDirectory();
        using TestVm vm = Machine(incoming: false, name == Ignored ? folder["ram"] : null).Filled(Golden.RamA());
        vm.FullEngine.Compat = new MigrationCompat { SendSwitchoverStart = true };
        vm.FullEngine.Context.IterateLimit = TimeSpan.FromMinutes(1);
        if (name == NoDetection) vm.Engine.Parameters = vm.Engine.Parameters with { ZeroPageDetection = ZeroPageDetection.None };
        if (name == Ignored) vm.Engine.SetCapabilities([new(MigrationCapability.XIgnoreShared, true)]);
        long offset = name == AtOffset ? Offset : 0;
        Assert.That(await vm.Engine.Migrate(MigrationAddress.Parse($"file:{folder["m"]},offset={offset}")), Is.EqualTo(MigrationStatus.Completed), () => $"{vm.Engine.Query().Error}");
        byte[] ours = File.ReadAllBytes(folder["m"]), theirs = Golden.Read(name);
        int at = ours.AsSpan().CommonPrefixLength(theirs);
        Assert.That((at, ours.Length), Is.EqualTo((theirs.Length, theirs.Length)), "place of the first difference, length");
    }

    private static TestVm Machine(bool incoming, string? file = null)
    {
        var vm = new TestVm(new VmOptions { IsIncoming = incoming, Memory = [new RamBlockOptions { Name = "m", SizeBytes = 1 << 20, FilePath = file }] });
        vm.Engine.SetCapabilities([new(MigrationCapability.MappedRam, true)]);
        return vm;
    }
}
