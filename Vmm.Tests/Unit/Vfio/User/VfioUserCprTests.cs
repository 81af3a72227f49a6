using Vmm.Core.Errors;
using Vmm.Core.Interop;
using Vmm.Devices.Vfio.Abstractions;
using Vmm.Devices.Vfio.User.Wire;
using Vmm.Tests.Support;
using static Vmm.Tests.Support.ScriptedVfioUserServer;

namespace Vmm.Tests.Unit.Vfio.User;

/// <summary>The client leaves its connection to another process, whatever the server does meanwhile (vfio-migration 7.4).</summary>
[TestFixture]
public sealed class VfioUserCprTests
{
    [Test]
    public void DmaRightBeforeTheLastReplyIsServed()
    {
        bool floods = false;
        byte[] write = Message(0x8000, VfioUserCommand.DmaWrite, VfioUserHeader.NoReply, Errno.None, Dma(0x1000, 4, [1, 2, 3, 4]));
        using var rig = new VfioUserRig(new ScriptedVfioUserServer(s =>
        {
            while (true)
            {
                while (Volatile.Read(ref floods) && !s.HasMessage) s.Raw(write);
                s.Answer(s.Receive());
            }
        }));
        rig.Io.SetBusMaster(true);
        Volatile.Write(ref floods, true);
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
        for (int i = 0; i < 200 && rig.Io.LostReason is null; i++)
        {
            rig.Io.SuspendCpr();
            rig.Io.ResumeCpr();
        }
        Volatile.Write(ref floods, false);
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
        Assert.That(rig.Io.LostReason, Is.Null);
    }

    [Test]
    public void AServerThatWaitsForDmaBeforeItAnswersIsServed([Values] bool twinSocket)
    {
        (OwnedFd ours, OwnedFd theirs) = Posix.SocketPair();
        OwnedFd? dmaSocket = twinSocket ? ours : null;
        var server = new ScriptedVfioUserServer();
        if (twinSocket)
            server.On(VfioUserCommand.Version, m => server.Reply(m, new VfioUserVersion { MaxMsgFds = 8, TwinSocket = new VfioUserTwinSocket(true, 0) }.ToPayload(), theirs));
        int asked = 0;
        server.On(VfioUserCommand.DeviceGetInfo, m =>
        {
            for (int i = 0; asked > 0 && i < 3; i++)
                Assert.That(server.Ask(VfioUserCommand.DmaRead, Dma(0x2000, 6), dmaSocket, m.Header.Id).Header.IsError, Is.False);
            asked++;
            server.Reply(m, Info());
        });
        using (var rig = new VfioUserRig(server))
        {
            rig.Io.SetBusMaster(true);
            rig.Io.SuspendCpr();
            Assert.That((asked, rig.Io.LostReason), Is.EqualTo((2, (VmmException?)null)));
            rig.Io.ResumeCpr();
            Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
        }
        ours.Dispose();
        theirs.Dispose();
    }

    [Test]
    public void AServerThatIsLostOverItIsAnError()
    {
        var server = new ScriptedVfioUserServer();
        int asked = 0;
        server.On(VfioUserCommand.DeviceGetInfo, m =>
        {
            if (asked++ == 0) server.Reply(m, Info());
            else server.Hangup();
        });
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.SuspendCpr, Throws.TypeOf<VfioException>().With.Message.Contains("'test'").And.InnerException.Message.Contains("the server ended the connection"));
    }

    [Test]
    public void AServerThatAnswersWithAnErrorIsHandedOver()
    {
        var server = new ScriptedVfioUserServer();
        int asked = 0;
        server.On(VfioUserCommand.DeviceGetInfo, m =>
        {
            if (asked++ == 0) server.Reply(m, Info());
            else server.Error(m, Errno.EINVAL);
        });
        using var rig = new VfioUserRig(server);
        Assert.That(rig.Io.SuspendCpr, Throws.Nothing);
        rig.Io.ResumeCpr();
        Assert.That(rig.Io.RegionRead(0, 0, new byte[4]), Is.EqualTo(Errno.None));
    }

    private static byte[] Info() => Bytes(16, static b => new VfioUserDeviceInfo(16, 3, 9, 5).Write(b));
}
