using System.Buffers.Binary;
using Vmm.Core.Errors;
using Vmm.Devices.Vfio.Abstractions;

namespace Vmm.Tests.Contract;

/// <summary>
/// What every device with migration states does (vfio-migration 1.7, 1.11 and 2), be it a fake or a device of the lab's kernel. Test names
/// carry the section of vfio-migration that they check. A fixture opens two devices of one kind and changes their state as a guest would.
/// </summary>
public abstract class VfioMigrationContract
{
    private const int Chunk = 4096;
    private readonly List<IVfioMigrationData> _open = [];

    /// <summary>The migration states that both devices support.</summary>
    protected abstract VfioMigrationFlags Flags { get; }

    /// <summary>The device that is saved; RUNNING before each test.</summary>
    private protected abstract IVfioDeviceIo Source { get; }

    /// <summary>The device that is loaded; RUNNING before each test.</summary>
    private protected abstract IVfioDeviceIo Destination { get; }

    /// <summary>Changes a device's state as a guest would and returns what <see cref="Observe"/> must find afterwards.</summary>
    private protected abstract byte[] Change(IVfioDeviceIo device);

    /// <summary>Reads the part of a device's state that a guest can see.</summary>
    private protected abstract byte[] Observe(IVfioDeviceIo device);

    /// <summary>True for a device without PRE_COPY, after a check that it refuses that state and stays in RUNNING.</summary>
    protected bool RefusesPreCopy()
    {
        if ((Flags & VfioMigrationFlags.PreCopy) != 0) return false;
        Assert.That(Source.SetMigrationState(VfioDeviceState.PreCopy, out _), Is.EqualTo(Errno.EINVAL));
        Assert.That(StateOf(Source), Is.EqualTo(VfioDeviceState.Running));
        return true;
    }

    [TearDown]
    public void CloseSessions()
    {
        foreach (IVfioMigrationData data in _open) data.Dispose();
        _open.Clear();
    }

    [TestCaseSource(typeof(VfioMigrationTable), nameof(VfioMigrationTable.Requests))]
    public void Spec2_ARequestEndsWhereTheTableSays(VfioDeviceState start, VfioDeviceState target)
    {
        byte[] state = start == VfioDeviceState.Resuming ? Save(Source) : [];
        if (!VfioMigrationTable.Has(start, Flags))
        {
            Assert.That(Source.SetMigrationState(start, out _), Is.EqualTo(Errno.EINVAL), "a state that the device lacks");
            Assert.That(StateOf(Source), Is.EqualTo(VfioDeviceState.Running));
            return;
        }
        IVfioMigrationData? session = Set(Source, start);
        if (start == VfioDeviceState.Resuming) WriteAll(session!, state);
        VfioDeviceState[]? path = VfioMigrationTable.Path(start, target, Flags);
        Errno errno = Source.SetMigrationState(target, out IVfioMigrationData? data);
        if (data is not null) _open.Add(data);
        Assert.Multiple(() =>
        {
            Assert.That(errno, Is.EqualTo(path is null ? Errno.EINVAL : Errno.None));
            Assert.That(StateOf(Source), Is.EqualTo(path is null ? start : target));
            Assert.That(data is not null, Is.EqualTo(path is not null && VfioMigrationTable.OpensData(start, path)), "whether the request opened a data session");
        });
    }

    [Test]
    public void Spec2_StateGoesFromDeviceToDeviceWhileTheFirstRuns()
    {
        if (RefusesPreCopy()) return;
        byte[] expected = Change(Source);
        IVfioMigrationData data = Set(Source, VfioDeviceState.PreCopy)!;
        byte[] early = ReadAll(data, Chunk, runs: true);
        Assert.That(Source.SetMigrationState(VfioDeviceState.StopCopy, out IVfioMigrationData? second), Is.EqualTo(Errno.None));
        Assert.That(second, Is.Null, "the session of PRE_COPY stays open");
        byte[] late = ReadAll(data, Chunk, runs: false);
        Assert.That(early.Length + late.Length, Is.Positive);
        Load(Destination, [.. early, .. late], Chunk);
        Assert.That(Observe(Destination), Is.EqualTo(expected));
    }

    [Test]
    public void Spec2_StateGoesFromDeviceToDeviceByStopCopyAlone([Values(1, 7, Chunk)] int step)
    {
        byte[] expected = Change(Source);
        Load(Destination, Save(Source, step), step);
        Assert.That(Observe(Destination), Is.EqualTo(expected));
    }

    [Test]
    public void Spec2_TheEndOfStopCopyIsPermanent()
    {
        IVfioMigrationData data = Set(Source, VfioDeviceState.StopCopy)!;
        ReadAll(data, Chunk, runs: false);
        for (int i = 0; i < 3; i++) Assert.That((data.Read(new byte[Chunk], out Errno errno), errno), Is.EqualTo((0, Errno.None)));
    }

    [Test]
    public void Spec2_AnAbortedSaveLeavesTheDeviceAsItWas()
    {
        byte[] expected = Change(Source);
        IVfioMigrationData data = Set(Source, Has(VfioMigrationFlags.PreCopy) ? VfioDeviceState.PreCopy : VfioDeviceState.StopCopy)!;
        data.Read(new byte[Chunk], out _);
        Set(Source, VfioDeviceState.Running);
        Assert.That(Observe(Source), Is.EqualTo(expected));
    }

    [Test]
    public void Spec2_ASessionThatEndedGivesEnodev()
    {
        IVfioMigrationData data = Set(Source, VfioDeviceState.StopCopy)!;
        Set(Source, VfioDeviceState.Stop);
        Assert.That((data.Read(new byte[Chunk], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        IVfioMigrationData next = Set(Source, VfioDeviceState.StopCopy)!;
        Assert.That(next.Read(new byte[Chunk], out _), Is.Not.Negative, "a new session works after the end of the old one");
        Assert.That((data.Read(new byte[Chunk], out errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
    }

    [Test]
    public void Spec2_DataGoOneWayOnly()
    {
        IVfioMigrationData saving = Set(Source, VfioDeviceState.StopCopy)!;
        Assert.That((saving.Write(new byte[8], out Errno errno), errno), Is.EqualTo((-1, Errno.EBADF)));
        IVfioMigrationData loading = Set(Destination, VfioDeviceState.Resuming)!;
        Assert.That((loading.Read(new byte[8], out errno), errno), Is.EqualTo((-1, Errno.EBADF)));
    }

    [Test]
    public void Spec2_StateCutShortIsRefusedAndOnlyAResetHelps()
    {
        byte[] state = Save(Source);
        IVfioMigrationData data = Set(Destination, VfioDeviceState.Resuming)!;
        WriteAll(data, state.AsSpan(0, state.Length - 1));
        AssertOnlyAResetHelps();
    }

    [Test]
    public void Spec2_MissingStateIsRefusedAndOnlyAResetHelps()
    {
        Set(Destination, VfioDeviceState.Resuming);
        AssertOnlyAResetHelps();
    }

    [Test]
    public void Spec2_ForeignStateIsNotLoaded()
    {
        byte[] state = Save(Source);
        state.AsSpan(0, 8).Fill(0xa5);
        IVfioMigrationData data = Set(Destination, VfioDeviceState.Resuming)!;
        // A driver may refuse the bytes and still go to STOP (mtty does), or accept the bytes and refuse to go to STOP.
        if (data.Write(state, out _) == state.Length) AssertOnlyAResetHelps();
        else AssertAResetHelps();
    }

    [Test]
    public void Spec1_7_AResetEndsASavingSession()
    {
        IVfioMigrationData data = Set(Source, VfioDeviceState.StopCopy)!;
        Assert.That(Source.Reset(), Is.EqualTo(Errno.None));
        Assert.That(StateOf(Source), Is.EqualTo(VfioDeviceState.Running));
        Assert.That((data.Read(new byte[Chunk], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
        IVfioMigrationData next = Set(Source, VfioDeviceState.StopCopy)!;
        Assert.That(next.Read(new byte[Chunk], out _), Is.Not.Negative);
    }

    [Test]
    public void Spec1_7_AResetEndsALoadingSession()
    {
        IVfioMigrationData data = Set(Destination, VfioDeviceState.Resuming)!;
        Assert.That(Destination.Reset(), Is.EqualTo(Errno.None));
        Assert.That((data.Write(new byte[8], out Errno errno), errno), Is.EqualTo((-1, Errno.ENODEV)));
    }

    [Test]
    public void Spec1_11_TheFlagsAreADefinedSet()
    {
        byte[] flags = new byte[8];
        Assert.That(Source.DeviceFeature(VfioDeviceFeature.Migration, VfioFeatureOp.Get, flags), Is.EqualTo(Errno.None));
        Assert.That((VfioMigrationFlags)BinaryPrimitives.ReadUInt64LittleEndian(flags), Is.EqualTo(Flags));
        Assert.That(Has(VfioMigrationFlags.StopCopy));
    }

    [Test]
    public void Spec1_11_AnUnknownFeatureIsEnotty() =>
        Assert.That(Source.DeviceFeature((VfioDeviceFeature)0x7fff, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.ENOTTY));

    [Test]
    public void Spec1_11_TheDataSizeIsKnownInEveryState()
    {
        foreach (VfioDeviceState state in Enum.GetValues<VfioDeviceState>().Where(s => VfioMigrationTable.Has(s, Flags)))
        {
            Assert.That(Source.Reset(), Is.EqualTo(Errno.None));
            Set(Source, state);
            Assert.That(Source.DeviceFeature(VfioDeviceFeature.MigDataSize, VfioFeatureOp.Get, new byte[8]), Is.EqualTo(Errno.None), state.ToString());
        }
    }

    [Test]
    public void Spec1_11_PrecopyFiguresAreForPrecopyStatesOnly()
    {
        if (RefusesPreCopy()) return;
        IVfioMigrationData data = Set(Source, VfioDeviceState.PreCopy)!;
        Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.None));
        if (Has(VfioMigrationFlags.P2P))
        {
            Set(Source, VfioDeviceState.PreCopyP2P);
            Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.None));
        }
        Set(Source, VfioDeviceState.StopCopy);
        Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.EINVAL));
        Assert.That(Source.Reset(), Is.EqualTo(Errno.None));
        // The errno may vary, because mtty checks the device's state before the session.
        Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.ENODEV).Or.EqualTo(Errno.EINVAL));
        Set(Source, VfioDeviceState.PreCopy);
        Assert.That(data.PrecopyInfo(out _), Is.EqualTo(Errno.ENODEV));
        Assert.That(Set(Destination, VfioDeviceState.Resuming)!.PrecopyInfo(out _), Is.EqualTo(Errno.ENOTTY));
    }

    /// <summary>Requests a state and expects that the device reaches it.</summary>
    private protected IVfioMigrationData? Set(IVfioDeviceIo device, VfioDeviceState state)
    {
        Assert.That(device.SetMigrationState(state, out IVfioMigrationData? data), Is.EqualTo(Errno.None), $"to {state}");
        if (data is not null) _open.Add(data);
        Assert.That(StateOf(device), Is.EqualTo(state));
        return data;
    }

    /// <summary>Reads a device's whole state, then returns the device to RUNNING.</summary>
    private protected byte[] Save(IVfioDeviceIo device, int step = Chunk)
    {
        byte[] state = ReadAll(Set(device, VfioDeviceState.StopCopy)!, step, runs: false);
        Set(device, VfioDeviceState.Running);
        return state;
    }

    /// <summary>Writes a whole state into a device, then moves the device to RUNNING.</summary>
    private protected void Load(IVfioDeviceIo device, byte[] state, int step)
    {
        IVfioMigrationData data = Set(device, VfioDeviceState.Resuming)!;
        for (int at = 0; at < state.Length; at += step) WriteAll(data, state.AsSpan(at, Math.Min(step, state.Length - at)));
        Set(device, VfioDeviceState.Running);
    }

    private static VfioDeviceState StateOf(IVfioDeviceIo device)
    {
        Assert.That(device.GetMigrationState(out VfioDeviceState state), Is.EqualTo(Errno.None));
        return state;
    }

    private static byte[] ReadAll(IVfioMigrationData data, int step, bool runs)
    {
        var all = new MemoryStream();
        byte[] buffer = new byte[step];
        while (true)
        {
            int n = data.Read(buffer, out Errno errno);
            if (n == 0 || (runs && errno == Errno.ENOMSG)) return all.ToArray();
            Assert.That(errno, Is.EqualTo(Errno.None));
            all.Write(buffer, 0, n);
        }
    }

    private static void WriteAll(IVfioMigrationData data, ReadOnlySpan<byte> bytes)
    {
        while (bytes.Length > 0)
        {
            int n = data.Write(bytes, out Errno errno);
            Assert.That(errno, Is.EqualTo(Errno.None));
            Assert.That(n, Is.Positive);
            bytes = bytes[n..];
        }
    }

    private bool Has(VfioMigrationFlags flag) => (Flags & flag) != 0;

    private void AssertOnlyAResetHelps()
    {
        foreach (VfioDeviceState state in (VfioDeviceState[])[VfioDeviceState.Stop, VfioDeviceState.Running, VfioDeviceState.StopCopy])
        {
            Assert.That(Destination.SetMigrationState(state, out _), Is.Not.EqualTo(Errno.None), $"to {state}");
            Assert.That(StateOf(Destination), Is.EqualTo(VfioDeviceState.Resuming));
        }
        AssertAResetHelps();
    }

    private void AssertAResetHelps()
    {
        Assert.That(Destination.Reset(), Is.EqualTo(Errno.None));
        Assert.That(StateOf(Destination), Is.EqualTo(VfioDeviceState.Running));
        byte[] expected = Change(Source);
        Load(Destination, Save(Source), Chunk);
        Assert.That(Observe(Destination), Is.EqualTo(expected), "a valid state loads after the reset");
    }
}
