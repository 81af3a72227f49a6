using Microsoft.Extensions.DependencyInjection;
using Vmm.Core.Devices;
using Vmm.Core.Memory;
using Vmm.Migration;
using Vmm.Migration.Engine;

namespace Vmm.Tests.Support;

/// <summary>A VM in this process with its own service container.</summary>
internal sealed class TestVm : IDisposable
{
    private readonly ServiceProvider _provider;

    internal TestVm(VmOptions options, Action<VmmBuilder>? configure = null)
    {
        var services = new ServiceCollection();
        VmmBuilder builder = services.AddVmm().AddMigration();
        configure?.Invoke(builder);
        _provider = services.BuildServiceProvider(new ServiceProviderOptions { ValidateScopes = true });
        Vm = _provider.GetRequiredService<VmFactory>().Create(options);
    }

    internal Vm Vm { get; }

    internal IMigrationEngine Engine => Vm.Migration();

    /// <summary>The engine's own type, which lets tests choose the framing.</summary>
    internal MigrationEngine FullEngine => (MigrationEngine)Engine;

    internal RamBlock Ram => Vm.Memory.Blocks[0];

    /// <summary>Creates a VM with one RAM block.</summary>
    internal static TestVm WithRam(ulong sizeBytes, string block = "m", bool incoming = false, bool autoStart = true) => new(new VmOptions
    {
        Memory = [new RamBlockOptions { Name = block, SizeBytes = sizeBytes }], IsIncoming = incoming, AutoStart = autoStart,
    });

    /// <summary>Copies bytes into the first RAM block.</summary>
    internal TestVm Filled(ReadOnlySpan<byte> content)
    {
        content.CopyTo(Ram.Slice(0, content.Length));
        return this;
    }

    /// <summary>Fills every page, or every second one, with random data of this seed.</summary>
    internal TestVm FilledRandom(int seed, bool halfZero = false)
    {
        var random = new Random(seed);
        foreach (RamBlock block in Vm.Memory.Blocks)
            for (long page = 0; page < block.PageCount; page += halfZero ? 2 : 1) random.NextBytes(block.Slice((ulong)page * 4096, 4096));
        return this;
    }

    public void Dispose()
    {
        Vm.Dispose();
        _provider.Dispose();
    }
}

internal static class RamAssert
{
    /// <summary>Compares RAM and, when it differs, fails with block and page of the first difference.</summary>
    internal static void AreEqual(GuestMemory expected, GuestMemory actual)
    {
        foreach (RamBlock block in expected.Blocks)
        {
            RamBlock other = actual.FindBlock(block.Name)!;
            Assert.That(other.SizeBytes, Is.EqualTo(block.SizeBytes));
            for (long page = 0; page < block.PageCount; page++)
            {
                if (block.ReadOnlySlice((ulong)page * 4096, 4096).SequenceEqual(other.ReadOnlySlice((ulong)page * 4096, 4096))) continue;
                Assert.Fail($"block '{block.Name}' differs at page {page}");
            }
        }
    }
}
