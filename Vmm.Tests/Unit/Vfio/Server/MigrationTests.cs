using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Fakes;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.RawVfioUserClient;

namespace Vmm.Tests.Unit.Vfio.Server;

/// <summary>The migration states and data of the vfio-user server (vfio-user 8).</summary>
[TestFixture]
[Parallelizable(ParallelScope.All)]
[FixtureLifeCycle(LifeCycle.InstancePerTestCase)]
internal sealed class MigrationTests : FakeServerFixture
{
    private static readonly VfioDeviceState[] s_states =
        [VfioDeviceState.Stop, VfioDeviceState.Running, VfioDeviceState.StopCopy, VfioDeviceState.Resuming, VfioDeviceState.PreCopy];

    private static IEnumerable<object[]> Pairs() => from a in s_states from b in s_states select new object[] { a, b };

    /// <summary>The next step from one state towards a requested state, by the table of vfio-user 8.</summary>
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
        Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Running), "initial");
        Client.SetState(from);
        Fake.Transitions.Clear();
        var expected = new List<(VfioDeviceState, VfioDeviceState)>();
        VfioDeviceState? at = from;
        while (at is { } now && now != to)
        {
            at = Next(now, to);
            if (at is { } next) expected.Add((now, next));
        }
        if (at is null) Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest(to));
        else Client.SetState(to);
        Assert.That(Fake.Transitions, Is.EqualTo(at is null ? [] : expected));
        Assert.That(Client.State, Is.EqualTo(at ?? from));
    }

    [Test]
    public void S54_UnknownAndUnsupportedStatesAreInvalid([Values(0u, 5u, 7u, 8u, uint.MaxValue)] uint state) =>
        Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest((VfioDeviceState)state));

    [Test]
    public void S54_AFailedArcAnswersItsErrnoAndStaysAtTheLastCompletedState()
    {
        Fake.OnTransition = static (_, to) => to == VfioDeviceState.StopCopy ? (Errno)0xbeef : Errno.None;
        Client.Fails((Errno)0xbeef, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.StopCopy));
        Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Stop));
        Client.SetState(VfioDeviceState.Running);
    }

    [Test]
    public void S36_RepliesAreFullUntilTheLastAndPaddedAlways([Values(1, 7, 64, 1000, 1024, 65536)] int size)
    {
        Client.SetState(VfioDeviceState.StopCopy);
        var all = new List<byte>();
        while (true)
        {
            byte[] part = Client.MigRead(size);
            all.AddRange(part);
            if (part.Length < size) break;
        }
        Assert.That(all, Is.EqualTo(Fake.State));
        for (int i = 0; i < 3; i++) Assert.That(Client.MigRead(size), Is.Empty);
        Assert.That(Client.MigRead(0), Is.Empty);
    }

    [Test]
    public void S40_DataComesInPiecesOfAnySize()
    {
        Client.SetState(VfioDeviceState.Resuming);
        Client.MigWrite([]);
        byte[] state = Fake.State;
        for (int at = 0, n = 0; at < state.Length; at += n, n = (n + 1) % 97) Client.MigWrite(state.AsSpan(at, Math.Min(n, state.Length - at)));
        Client.SetState(VfioDeviceState.Running);
        Assert.That(Fake.Loaded, Is.EqualTo(state));
    }

    [Test]
    public void DataMoveOnlyInTheirStates([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        Client.SetState(state);
        if (state is VfioDeviceState.PreCopy or VfioDeviceState.StopCopy) Client.MigRead(16);
        else Client.Invalid(VfioUserCommand.MigDataRead, 24, 16);
        if (state == VfioDeviceState.Resuming) Client.MigWrite([1]);
        else Client.Invalid(VfioUserCommand.MigDataWrite, 9, 1, (byte)1);
    }

    [Test]
    public void MigDataRequestsAreBounded()
    {
        Client.SetState(VfioDeviceState.StopCopy);
        Client.Invalid(VfioUserCommand.MigDataRead, 8, 0x10_0001);
        Client.Invalid(VfioUserCommand.MigDataRead, 23, 16);
        Client.Invalid(VfioUserCommand.MigDataRead, 24);
        Client.SetState(VfioDeviceState.Resuming);
        Client.Invalid(VfioUserCommand.MigDataWrite, 12, 4, (byte)1, (byte)2, (byte)3);
        Client.Invalid(VfioUserCommand.MigDataWrite, 11, 4, 0);
        Client.Invalid(VfioUserCommand.MigDataWrite, uint.MaxValue, uint.MaxValue);
        Assert.That(Fake.Loaded, Is.Empty);
    }

    [Test]
    public void TheClientsOwnTransferLimitHoldsForReadsAndWrites()
    {
        Client.Dispose();
        using RawVfioUserClient small = Served.Attach("""{"capabilities":{"max_data_xfer_size":4}}""");
        small.SetState(VfioDeviceState.StopCopy);
        Assert.That(small.MigRead(4), Has.Length.EqualTo(4));
        small.Invalid(VfioUserCommand.MigDataRead, 13, 5);
        small.SetState(VfioDeviceState.Resuming);
        small.Invalid(VfioUserCommand.MigDataWrite, 13, 5, (byte)0, 0);
    }

    [Test]
    public void S38_RunningStraightFromResumingValidatesAndFailsTheSameWay()
    {
        Fake.CommitResult = Errno.EINVAL;
        Client.SetState(VfioDeviceState.Resuming);
        foreach (VfioDeviceState target in (VfioDeviceState[])[VfioDeviceState.Running, VfioDeviceState.Stop])
        {
            Client.Fails(Errno.EINVAL, VfioUserCommand.DeviceFeature, StateRequest(target));
            Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Resuming));
        }
        Client.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That(Client.State, Is.EqualTo(VfioDeviceState.Running));
    }

    [Test]
    public void S56_OverTheLimitIsEfbigAndTheSessionTakesNoMore()
    {
        Client.SetState(VfioDeviceState.Resuming);
        Client.MigWrite(Fake.State);
        for (int i = 0; i < 2; i++) Client.Fails(Errno.EFBIG, VfioUserCommand.MigDataWrite, Bytes(9, 1, (byte)1));
        Client.Fails(Errno.EFBIG, VfioUserCommand.DeviceFeature, StateRequest(VfioDeviceState.Stop));
    }

    [Test]
    public void S49_S50_ThreeCancelsInARowLeaveNothingAndTheFourthAttemptIsComplete()
    {
        for (int i = 0; i < 3; i++)
        {
            Client.SetState(VfioDeviceState.PreCopy);
            Client.MigRead(1000 * i);
            if (i > 0) Client.SetState(VfioDeviceState.StopCopy);
            if (i > 0) Client.MigRead(500);
            Client.SetState(VfioDeviceState.Running);
            Assert.That((Fake.OpenSessions, Served.Device.Fsm.HasSession), Is.EqualTo((0, false)));
        }
        Client.SetState(VfioDeviceState.PreCopy);
        byte[] first = Client.MigRead(100);
        Client.SetState(VfioDeviceState.StopCopy);
        Assert.That((byte[])[.. first, .. Client.MigReadAll()], Is.EqualTo(Fake.State));
        Client.SetState(VfioDeviceState.Stop);
        Assert.That(Served.Device.Fsm.SaveCount, Is.EqualTo(4));
    }

    [Test]
    public void S35_ResetCancelsInEveryState([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        Client.SetState(state);
        Client.Ok(VfioUserCommand.DeviceReset, []);
        Assert.That((Client.State, Fake.OpenSessions), Is.EqualTo((VfioDeviceState.Running, 0)));
    }

    [Test]
    public void S35_QueriesMapsAndInterruptsWorkInEveryState([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        Client.SetState(state);
        Client.Ok(VfioUserCommand.DeviceGetInfo, Bytes(16, 0, 0, 0));
        Client.Map(0x1000, 0x1000, null);
        Client.Ok(VfioUserCommand.DmaUnmap, UnmapRequest(0x1000, 0x1000));
        Client.SetIrqs(0x21, 2, 0, 0);
        Client.RegionWrite(0, 0, 0x55u);
        Assert.That(Client.Read32(0, 0), Is.EqualTo(state == VfioDeviceState.StopCopy ? 0 : 0x55), "the server drops writes in STOP_COPY without an error");
    }

    [Test]
    public void S33_AfterADisconnectTheNextClientFindsTheDeviceRunning([ValueSource(nameof(s_states))] VfioDeviceState state)
    {
        Client.RegionWrite(0, 8, 0x1234u);
        Client.SetState(state);
        Client.HangUp();
        using RawVfioUserClient next = Served.Attach();
        Assert.That(next.State, Is.EqualTo(VfioDeviceState.Running));
        Assert.That(Fake.Log, Does.Contain("client lost"));
        Assert.That(Fake.Log.Contains("reset LoadAborted"), Is.EqualTo(state == VfioDeviceState.Resuming), "the server resets only a half-loaded device");
        Assert.That(next.Read32(0, 8), Is.EqualTo(0x1234), "the disconnect keeps the device's registers");
    }

    [Test]
    public void FeaturesAnswerByTheTable()
    {
        Assert.That(Client.Ok(VfioUserCommand.DeviceFeature, Bytes(16, 0x10001)), Is.EqualTo(Bytes(16, 0x10001, 5UL)));
        byte[] probe = Bytes(8, 0x70002);
        Assert.That(Client.Ok(VfioUserCommand.DeviceFeature, probe), Is.EqualTo(probe));
        foreach (uint feature in (uint[])[1, 2, 6, 7, 8]) Client.Ok(VfioUserCommand.DeviceFeature, Bytes(8, 0x40000 | feature));
        Client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x10001 | 0x20000, 0UL);
        Client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x20001, 0UL);
        Client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x70001);
        Client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x10001);
        Client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x10002);
        Client.Invalid(VfioUserCommand.DeviceFeature, 15, 0x20002, 1, -1);
        Client.Invalid(VfioUserCommand.DeviceFeature, 12, 0x20002, 1);
        Client.Invalid(VfioUserCommand.DeviceFeature, 16, 0x30002, 1, -1);
        Client.Invalid(VfioUserCommand.DeviceFeature, 7, 0x40001);
        Client.Invalid(VfioUserCommand.DeviceFeature, 8, 1);
        Client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x80000 | 0x40001);
        Client.Invalid(VfioUserCommand.DeviceFeature, 8);
        Client.Invalid(VfioUserCommand.DeviceFeature, 8, 0x40000 | 99);
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
        Client.SetIrqs(0x24, 2, 3, 1, vector);
        Client.Map(0x10000, 0x1000, null);
        Client.SetState(VfioDeviceState.Resuming);
        Client.MigWrite(Fake.State);
        Client.SetState(VfioDeviceState.Running);
        Fake.Host.Irqs.Raise(2, 3);
        Assert.That(IsSignalled(vector));
        Assert.That(Fake.Host.Dma.RegionCount, Is.EqualTo(1));
    }
}
