using Vmm.Core.Errors;
using Vmm.Core.RunStates;
using Vmm.Core.SaveVm;
using Vmm.Core.VmStates;
using Vmm.Core.Wire;
using Vmm.Tests.Support;

namespace Vmm.Tests.Unit.Core.SaveVm;

/// <summary>An error in a stream points at the bytes that are wrong, so that a reader finds them in a dump, and says what was expected and found.</summary>
[TestFixture]
public sealed class LoadStreamErrorTests
{
    /// <summary>Length of the good section before the bad one; a section's header has 17 bytes with a name of three.</summary>
    private const int Good = 26;

    private static readonly VmStateDescription<Device> s_device = new()
    {
        Name = "dev", VersionId = 2, MinimumVersionId = 1, Fields = [VmState.UInt32<Device>("value", static d => ref d.Value)],
    };

    private static readonly VmStateDescription<Device> s_other = new() { Name = "two", Fields = [VmState.UInt32<Device>("value", static d => ref d.Value)] };

    private static IEnumerable<TestCaseData> Cases()
    {
        yield return Case("type", Good, ["expected START, PART, END, FULL or EOF", "found 0x09"], static s => s.U8(9));
        yield return Case("unknown section", Good, ["unknown section 'any' instance 0"], static s => s.First(4, 8, "any", 0, 1));
        yield return Case("id of another section", Good + 1, ["'two/0'", "an id that 'dev/0' does not use", "found 7"], static s => s.First(4, 7, "two", 0, 1));
        yield return Case("id that nobody announced", Good + 1, ["expected the id of a START section", "found 99"], static s => s.U8(2).U32(99));
        yield return Case("version", Good + 13, ["'dev/0'", "version 3 is newer than 2"], static s => s.First(4, 7, "dev", 0, 3));
        yield return Case("no taker", Good + 17, ["'out/0'", "takes no FULL section"], static s => s.First(4, 8, "out", 0, 1));
        yield return Case("footer", Good + 21, ["'dev/0'", "expected 0x7e", "found 0x7d"], static s => s.First(4, 7, "dev", 0, 2).U32(5).U8(0x7d));
        yield return Case("id in footer", Good + 22, ["'dev/0'", "expected 7", "found 8"], static s => s.First(4, 7, "dev", 0, 2).U32(5).Footer(8));
        yield return Case("cut", Good + 17, ["'dev/value'", $"ended at offset {Good + 18}", "expected 4 bytes, found 1"], static s => s.First(4, 7, "dev", 0, 2).U8(1));

        static TestCaseData Case(string name, long offset, string[] texts, Func<StreamBuilder, StreamBuilder> bad) =>
            new TestCaseData(bad(new StreamBuilder().Full(7, "dev", 2, [0, 0, 0, 5])).ToArray(), offset, texts).SetArgDisplayNames(name);
    }

    [TestCaseSource(nameof(Cases))]
    public void AnErrorPointsAtTheWrongBytes(byte[] stream, long offset, string[] texts)
    {
        var registry = new SaveVmRegistry(new Bql());
        var device = new Device();
        using IDisposable first = registry.RegisterVmState(s_device, device), second = registry.RegisterVmState(s_other, new Device());
        using IDisposable third = registry.Register(new SaveVmRegistration { IdStr = "out" }, new SaveVmHandlers { Save = new NeverAsked() });
        var load = new LoadStream(registry, new QemuFileReader(new MemoryChannel(stream)), new LoadContext());
        load.LoadSetup();

        VmmException error = Assert.Catch<VmmException>(load.ReadSections)!;
        load.LoadCleanup();

        Assert.That(device.Value, Is.EqualTo(5), "the good section before it is loaded");
        Assert.That(Offset(error), Is.EqualTo(offset));
        foreach (string text in texts) Assert.That(VmmException.Describe(error), Does.Contain(text));
    }

    private static long? Offset(VmmException error) => error switch
    {
        StreamFormatException e => e.Offset,
        StreamTruncatedException e => e.Offset,
        IncompatibleStateException e => e.Offset,
        _ => null,
    };

    private sealed class Device
    {
        public uint Value;
    }

    private sealed class NeverAsked : ISavePrepare
    {
        public SaveRoles SavePrepare(SaveContext context) => throw new InvalidOperationException("nothing is saved here");
    }
}
