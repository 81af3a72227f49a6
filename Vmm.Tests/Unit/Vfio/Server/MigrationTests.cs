using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Io;
using Vmm.Devices.Vfio.User;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The migration states and data of the vfio-user server (spec vfio-user 8).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class MigrationTests : IDisposable
{
    private static readonly VfioDeviceState[] s_states =
        [VfioDeviceState.Stop, VfioDeviceState.Running, VfioDeviceState.StopCopy, VfioDeviceState.Resuming, VfioDeviceState.PreCopy];
    private readonly FakeVfioUserBackend _fake = new();
    private readonly ServedDevice _served;
    private readonly RawVfioUserClient _client;

    public MigrationTests()
    {
        _served = new ServedDevice(_fake);
        _client = _served.Attach();
    }

    public void Dispose()
    {
        _client.Dispose();
        _served.Dispose();
        Assert.That((_fake.OpenSessions, _fake.Quiesced), Is.EqualTo((0, 0)), "sessions and quiesces left behind");
    }

    private static IEnumerable<object[]> Pairs() => from a in s_states from b in s_states select new object[] { a, b };

    /// <summary>The table of spec 8, requested to next step.</summary>
    private static VfioDeviceState? Next(VfioDeviceState from, VfioDeviceState to) => (from, to) switch
    {
        (VfioDeviceState.StopCopy, VfioDeviceState.PreCopy) => null,
        (VfioDeviceState.Stop, VfioDeviceState.PreCopy) => VfioDeviceState.Running,
        (VfioDeviceState.Stop, _) => to,
        (VfioDeviceState.Running, VfioDeviceState.StopCopy or VfioDeviceState.Resuming) => VfioDeviceState.Stop,
        (VfioDeviceState.Running, _) => to,
        (VfioDeviceState.StopCopy or VfioDeviceState.Resuming, _) => VfioDeviceState.Stop,
        (VfioDeviceState.PreCopy, VfioDeviceState.StopCopy) => to,
        _ => VfioDeviceState.Running,
    };

    [TestCaseSource(nameof(Pairs))]
    public void S57_EveryPairOfStatesWalksTheTableAndUnreachableOnesAreInvalid(VfioDeviceState from, VfioDeviceState to)
    {
        Assert.That(_client.State, Is.EqualTo(VfioDeviceState.Running), "initial");
        _client.SetState(from);
        _fake.Transitions.Clear();
        var expected = new List<(VfioDeviceState, VfioDeviceState)>();
        VfioDeviceState? at = from;
        while (at is { } now && now != to)
        {
            at = Next(now, to);
            if (at is { } next) expected.Add((now, next));
        }
        if (at is null) _client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest(to));
        else _client.SetState(to);
        Assert.That(_fake.Transitions, Is.EqualTo(at is null ? [] : expected));
        Assert.That(_client.State, Is.EqualTo(at ?? from));
    }

    [Test]
    public void S54_UnknownAndUnsupportedStatesAreInvalid([Values(0u, 5u, 7u, 8u, uint.MaxValue)] uint state) =>
        _client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest((VfioDeviceState)state));

    [Test]
    public void S54_AFailedArcAnswersItsErrnoAndStaysAtTheLastCompletedState()
    {
        _fake.OnTransition = static (_, to) => to == VfioDeviceState.StopCopy ? (Errno)0xbeef : Errno.None;
        _client.Fails((Errno)0xbeef, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.StopCopy));
        Assert.That(_client.State, Is.EqualTo(VfioDeviceState.Stop));
        _client.SetState(VfioDeviceState.Running);
    }

    [Test]
    public void S36_RepliesAreFullUntilTheLastAndPaddedAlways([Values(1, 7, 64, 1000, 1024, 65536)] int size)
    {
        _client.SetState(VfioDeviceState.StopCopy);
        var all = new List<byte>();
        while (true)
        {
            byte[] part = _client.MigRead(size);
            all.AddRange(part);
            if (part.Length < size) break;
        }
        Assert.That(all, Is.EqualTo(_fake.State));
        for (int i = 0; i < 3; i++) Assert.That(_client.MigRead(size), Is.Empty);
        Assert.That(_client.MigRead(0), Is.Empty);
    }

    [Test]
    public void S40_DataComesInPiecesOfAnySize()
    {
        _client.SetState(VfioDeviceState.Resuming);
        _client.MigWrite([]);
        byte[] state = _fake.State;
        for (int at = 0, n = 0; at < state.Length; at += n, n = (n + 1) % 97) _client.MigWrite(state.AsSpan(at, Math.Min(n, state.Length - at)));
        _client.SetState(VfioDeviceState.Running);
        Assert.That(_fake.Loaded, Is.EqualTo(state));
    }

    [Test]
    public void DataMoveOnlyInTheirStates([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        _client.SetState(state);
        if (state is VfioDeviceState.PreCopy or VfioDeviceState.StopCopy) _client.MigRead(16);
        else _client.Invalid(VfioUserCommand.MigDataRead, 24, 16);
        if (state == VfioDeviceState.Resuming) _client.MigWrite([1]);
        else _client.Invalid(VfioUserCommand.MigDataWrite, 9, 1, (byte)1);
    }

    [Test]
    public void MigDataRequestsAreBounded()
    {
        _client.SetState(VfioDeviceState.StopCopy);
        _client.Invalid(VfioUserCommand.MigDataRead, 8, 0x10_0001);
        _client.Invalid(VfioUserCommand.MigDataRead, 23, 16);
        _client.Invalid(VfioUserCommand.MigDataRead, 24);
        _client.SetState(VfioDeviceState.Resuming);
        _client.Invalid(VfioUserCommand.MigDataWrite, 12, 4, (byte)1, (byte)2, (byte)3);
        _client.Invalid(VfioUserCommand.MigDataWrite, 11, 4, 0);
        _client.Invalid(VfioUserCommand.MigDataWrite, uint.MaxValue, uint.MaxValue);
        Assert.That(_fake.Loaded, Is.Empty);
    }

    [Test]
    public void TheClientsOwnTransferLimitHoldsForReadsAndWrites()
    {
        _client.Dispose();
        using RawVfioUserClient small = _served.Attach("""{"capabilities":{"max_data_xfer_size":4}}""");
        small.SetState(VfioDeviceState.StopCopy);
        Assert.That(small.MigRead(4), Has.Length.EqualTo(4));
        small.Invalid(VfioUserCommand.MigDataRead, 13, 5);
        small.SetState(VfioDeviceState.Resuming);
        small.Invalid(VfioUserCommand.MigDataWrite, 13, 5, (byte)0, 0);
    }

    [Test]
    public void S38_RunningStraightFromResumingValidatesAndFailsTheSameWay()
    {
        _fake.CommitResult = Errno.EINVAL;
        _client.SetState(VfioDeviceState.Resuming);
        foreach (VfioDeviceState target in (VfioDeviceState[])[VfioDeviceState.Running, VfioDeviceState.Stop])
        {
            _client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest(target));
            Assert.That(_client.State, Is.EqualTo(VfioDeviceState.Resuming));
        }
        _client.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That(_client.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public void S56_OverTheLimitIsEfbigAndTheSessionTakesNoMore()
    {
        _client.SetState(VfioDeviceState.Resuming);
        _client.MigWrite(_fake.State);
        for (int i = 0; i < 2; i++) _client.Fails(Errno.EFBIG, VfioUserCommand.MigDataWrite, Bytes(9, 1, (byte)1));
        _client.Fails(Errno.EFBIG, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Stop));
    }

    [Test]
    public void S49_S50_ThreeCancelsInARowLeaveNothingAndTheFourthAttemptIsComplete()
    {
        for (int i = 0; i < 3; i++)
        {
            _client.SetState(VfioDeviceState.PreCopy);
            _client.MigRead(1000 * i);
            if (i > 0) _client.SetState(VfioDeviceState.StopCopy);
            if (i > 0) _client.MigRead(500);
            _client.SetState(VfioDeviceState.Running);
            Assert.That((_fake.OpenSessions, _served.Device.Fsm.HasSession), Is.EqualTo((0, false)));
        }
        _client.SetState(VfioDeviceState.PreCopy);
        byte[] first = _client.MigRead(100);
        _client.SetState(VfioDeviceState.StopCopy);
        Assert.That((byte[])[.. first, .. _client.MigReadAll()], Is.EqualTo(_fake.State));
        _client.SetState(VfioDeviceState.Stop);
        Assert.That(_served.Device.Fsm.SaveCount, Is.EqualTo(4));
    }

    [Test]
    public void S35_ResetCancelsInEveryState([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        _client.SetState(state);
        _client.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That((_client.State, _fake.OpenSessions), Is.EqualTo((VfioDeviceState.Running, 0)));
    }

    [Test]
    public void S35_QueriesMapsAndInterruptsWorkInEveryState([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        _client.SetState(state);
        _client.Ok(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0));
        _client.Map(0x1000, 0x1000, null);
        _client.Ok(VfioUserCommand.DmaUnmap, UnmapRequest(0x1000, 0x1000));
        _client.SetIrqs(0x21, 2, 0, 0);
        _client.RegionWrite(0, 0, 0x55u);
        Assert.That(_client.Read32(0, 0), Is.EqualTo(state == VfioDeviceState.StopCopy ? 0 : 0x55), "writes in STOP_COPY are dropped, without an error");
    }

    [Test]
    public void S33_AfterADisconnectTheNextClientFindsTheDeviceRunning([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        _client.RegionWrite(0, 8, 0x1234u);
        _client.SetState(state);
        _client.HangUp();
        using RawVfioUserClient next = _served.Attach();
        Assert.That(next.State, Is.EqualTo(VfioDeviceState.Running));
        Assert.That(_fake.Log, Does.Contain("client lost"));
        Assert.That(_fake.Log.Contains("reset LoadAborted"), Is.EqualTo(state == VfioDeviceState.Resuming), "only a half-loaded device is reset");
        Assert.That(next.Read32(0, 8), Is.EqualTo(0x1234), "device state stays");
    }

    [Test]
    public void FeaturesAnswerByTheTable()
    {
        Assert.That(_client.Ok(VfioUserCommand.DeviceFeature, Bytes(16, 0x10001)), Is.EqualTo(Bytes(16, 0x10001, 5UL)));
        byte[] probe = Bytes(8, 0x70002);
        Assert.That(_client.Ok(VfioUserCommand.DeviceFeature, probe), Is.EqualTo(probe));
        foreach (uint feature in (uint[])[1, 2, 6, 7, 8]) _client.Ok(VfioUserCommand.DeviceFeature, Bytes(8, 0x40000 | feature));
        _client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x10001 | 0x20000, 0UL);
        _client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x20001, 0UL);
        _client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x70001);
        _client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x10001);
        _client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x10002);
        _client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x20002, 1, -1);
        _client.Invalid(VfioUserCommand.DeviceFeature, 12, 0x20002, 1);
        _client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x30002, 1, -1);
        _client.Invalid(VfioUserCommand.DeviceFeature, 7, 0x40001);
        _client.Invalid(VfioUserCommand.DeviceFeature, 8, 1);
        _client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x80000 | 0x40001);
        _client.Invalid(VfioUserCommand.DeviceFeature, 8);
        _client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x40000 | 99);
    }

    [Test]
    public void WithoutMigrationEveryFeatureIsInvalid()
    {
        using var served = new ServedDevice(new FakeVfioUserBackend { MigrationFlags = VfioMigrationFlags.None });
        using RawVfioUserClient client = served.Attach();
        foreach (uint feature in (uint[])[1, 2, 6, 7, 8]) client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x40000 | feature);
        client.Invalid(VfioUserCommand.MigDataRead, 24, 16);
    }

    [Test]
    public void S39_EventFdsAndMapsFromBeforeResumingStayValid()
    {
        using var vector = Posix.EventFd();
        _client.SetIrqs(0x24, 2, 3, 1, vector);
        _client.Map(0x10000, 0x1000, null);
        _client.SetState(VfioDeviceState.Resuming);
        _client.MigWrite(_fake.State);
        _client.SetState(VfioDeviceState.Running);
        _fake.Host.Irqs.Raise(2, 3);
        Assert.That(IsSignalled(vector));
        Assert.That(_fake.Host.Dma.RegionCount, Is.EqualTo(1));
    }
}
